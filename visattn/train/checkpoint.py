"""Checkpoints that survive a kill at any moment: whole or not there. Nothing is ever unpickled.

RUN/checkpoints/00000123/        after update 123; a folder under this name is complete
    shard-*.safetensors          tensors of the model, its average and the optimizer, each process its part
                                 (torch.distributed.checkpoint: any number of processes can read them)
    state.json                   everything else; the one of an epoch is written before its evaluation and completed
                                 with the row after it
    SHA256SUMS                   of all files above; `sha256sum -c SHA256SUMS` checks them too
"""

import contextlib
import hashlib
import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from safetensors import safe_open
from timm.utils import unwrap_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from visattn.train.config import FREE_ON_RESUME, OVERRIDABLE, Config, recipe
from visattn.train.distributed import World
from visattn.train.errors import CheckpointError, shown
from visattn.train.files import sha256, sync_folder, write_atomic
from visattn.train.metrics import say
from visattn.weights import first_line

if TYPE_CHECKING:
    from visattn.train.engine import TrainState
    from visattn.train.loader import Batches

FORMAT = 1
NAME = re.compile(r"\d{8}")
FILE = re.compile(r"[\w-]+(\.[\w-]+)*")  # no folders, no ..
UNFINISHED = re.compile(r"\.(state\.json|SHA256SUMS)\.tmp")  # what a kill leaves of write_atomic
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(folder: Path, state: "TrainState", config: Config, world: World) -> None:
    """Write the state after an update; all processes together.

    Raises:
        CheckpointError: on all processes, if one of them cannot write; older checkpoints are as they were.
    """
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"{state.update:08d}"
    temporary = checkpoints / f".{final.name}.tmp"
    tensors, values = _pack(state)
    # All that safetensors takes; parameters of a group may share their group's tensors.
    tensors = {k: v.clone() if ".param_groups." in k else v.contiguous() for k, v in tensors.items()}
    values = {"format": FORMAT, "recipe": recipe(config), **values}

    def prepare() -> None:
        _clean(checkpoints)
        temporary.mkdir(parents=True)

    def write() -> None:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)

    def finish() -> None:
        write_atomic(temporary / "state.json", json.dumps(values, default=_type_name).encode())
        names = sorted(path.name for path in temporary.iterdir())
        sums = "".join(f"{sha256(temporary / name)}  {name}\n" for name in names)
        write_atomic(temporary / "SHA256SUMS", sums.encode())
        replaced = _set_aside(final) if final.exists() else None
        try:
            temporary.rename(final)  # after a kill before this `sweep` does it
        except OSError:
            if replaced:
                replaced.rename(final)
            raise
        sync_folder(checkpoints)
        # Newer ones, which a resumed run has passed over, are damaged: they must not count.
        older = [path for path in _complete(checkpoints) if path <= final]
        with contextlib.suppress(OSError):  # what stays goes after the next one
            for old in older[config.keep_checkpoints :]:
                _set_aside(old)
        _clean(checkpoints)

    try:
        for step, mine in ((prepare, world.main), (write, True), (finish, world.main)):
            _together(step if mine else lambda: None, world, f"expected to write {final}")
    except CheckpointError:
        if world.main:
            _clean(checkpoints)  # a full disk needs the room
        raise


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to go: a kill while deleting must not leave half of one under a good name."""
    return path.rename(path.with_name(f".{path.name}.old"))


def _clean(checkpoints: Path) -> None:
    for name in (".*.tmp", ".*.old"):
        for left in checkpoints.glob(name):
            shutil.rmtree(left, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half done in a run's folder, which no other process may be writing to."""
    checkpoints = folder / "checkpoints"
    for left in [*folder.glob(".*.tmp"), *checkpoints.glob("*/.*.tmp")]:
        with contextlib.suppress(OSError):
            left.unlink()
    for left in checkpoints.glob(".*.tmp"):
        final = checkpoints / left.name[1:-4]
        with contextlib.suppress(OSError, CheckpointError):
            if not final.exists():
                verify(left)
                left.rename(final)  # only its name was missing
    _clean(checkpoints)


def save_progress(folder: Path, state: "TrainState", config: Config, world: World) -> None:
    """Bring the plain values of the checkpoint of this update up to date; its tensors stay as they are.

    Raises:
        CheckpointError: on all processes, if that cannot be written; the checkpoint is whole even so.
    """
    path = folder / "checkpoints" / f"{state.update:08d}"

    def rewrite() -> None:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        content = json.dumps({**values, "progress": state.progress()}).encode()
        lines = (path / "SHA256SUMS").read_text(encoding="ascii").splitlines(keepends=True)
        others = [line for line in lines if not line.endswith("  state.json\n")]
        new = f"{hashlib.sha256(content).hexdigest()}  state.json\n"
        # Both sums first: at any moment one of them fits.
        write_atomic(path / "SHA256SUMS", "".join([*lines, new]).encode())
        write_atomic(path / "state.json", content)
        write_atomic(path / "SHA256SUMS", "".join([*others, new]).encode())

    _together(rewrite if world.main else lambda: None, world, f"expected to write {path / 'state.json'}")


def _together(step: Callable[[], None], world: World, expected: str) -> None:
    """Run a step; if it fails on any process, raise on all."""
    problem = None
    try:
        step()
    except (OSError, RuntimeError) as error:
        problem = first_line(error)
    except dcp.CheckpointException as error:  # holds what each process raised
        problem = first_line(next(iter(error.failures.values()))[0])
    problems = [text for text in world.gather(problem) if text]
    if problems:
        raise CheckpointError(f"{expected}, got: {problems[0]}; try another --output, or make room")


def _pack(state: "TrainState") -> tuple[dict[str, Any], dict[str, Any]]:
    """The state as tensors (the live ones, so that loading can write into them) and as plain values."""
    model = unwrap_model(state.task.get_trainable_module())
    optimizer = get_optimizer_state_dict(model, state.optimizer, options=FLAT)
    tensors = {f"model.{key}": value for key, value in get_model_state_dict(model).items()}
    if state.task.has_ema():
        average = unwrap_model(state.task.get_trainable_module(ema=True))
        tensors |= {f"ema.{key}": value for key, value in get_model_state_dict(average).items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.items() if isinstance(v, torch.Tensor)}
    values = {
        "optimizer": {key: value for key, value in optimizer.items() if not isinstance(value, torch.Tensor)},
        "scaler": state.scaler.state_dict(),
        "progress": state.progress(),
    }
    return tensors, values


def _complete(checkpoints: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in checkpoints.glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, reverse=True)


def exists(folder: Path) -> bool:
    """Whether a run has come to a checkpoint."""
    return bool(_complete(folder / "checkpoints"))


def newest(folder: Path, console: Console) -> Path | None:
    """The newest checkpoint of a run that is whole; damaged ones are named and passed over.

    None if the run has not come to its first one. Raises CheckpointError if all are damaged.
    """
    problems = []
    for path in _complete(folder / "checkpoints"):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            say(console, f"warning: {error}")
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"expected a whole checkpoint in {folder}, got none; try a new run without --resume")
    return None


def verify(path: Path) -> None:
    """Raise CheckpointError unless a checkpoint holds exactly the plain files that its SHA256SUMS lists, unchanged."""
    try:
        lines = (path / "SHA256SUMS").read_text(encoding="ascii").splitlines()
        sums = defaultdict(set)  # a kill may leave the new sum of a file beside the old one
        for line in lines:
            digest, name = line.split("  ", 1)
            sums[name].add(digest)
        present = {file.name for file in path.iterdir() if file.is_file() and not file.is_symlink()}
        left = {name for name in present if UNFINISHED.fullmatch(name)}
        present -= left
        strange = sorted({file.name for file in path.iterdir()} - left ^ (set(sums) | {"SHA256SUMS"}))
        if strange or present != set(sums) | {"SHA256SUMS"} or not all(FILE.fullmatch(name) for name in sums):
            raise ValueError(f"other files than listed: {', '.join(strange) or 'a link'}")
        for name, expected in sums.items():
            if sha256(path / name) not in expected:
                raise ValueError(f"{name} has changed")
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):
                    pass  # checks the header and the offsets
    except Exception as error:  # whatever a damaged file makes the parsers say
        raise CheckpointError(
            f"expected a whole checkpoint at {path}, got {first_line(error)}; try an older one"
        ) from error


def restore(path: Path, state: "TrainState", config: Config, world: World, batches: "Batches") -> dict[str, Any]:
    """Load a verified checkpoint into a freshly built state, whatever the number of processes was.

    Returns the options it was written with. The learning rate is left as it was under them.
    """
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if set(values) != {"format", "recipe", "optimizer", "scaler", "progress"} or values["format"] != FORMAT:
            raise ValueError(f"contents of another kind: {', '.join(values)[:100]}")
        check_recipe(config, values["recipe"], OVERRIDABLE)
        tensors, fresh = _pack(state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=world.size == 1)
        optimizer = {key: _like(value, values["optimizer"][key]) for key, value in fresh["optimizer"].items()}
        optimizer |= {key: value for key, value in fresh["optimizer"].items() if key.endswith(".weight_decay")}
        optimizer |= {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        model = unwrap_model(state.task.get_trainable_module())
        set_model_state_dict(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        set_optimizer_state_dict(model, state.optimizer, optimizer, options=FLAT)
        if state.task.has_ema():
            average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
            set_model_state_dict(unwrap_model(state.task.get_trainable_module(ema=True)), average)
        if values["scaler"]:  # empty without float16
            state.scaler.load_state_dict(values["scaler"])
        images = state.images
        state.load_progress(values["progress"])
        if state.images != images:
            raise CheckpointError(
                f"--data: expected the {' and '.join(map(str, state.images))} training and test images of the run, got "
                f"{' and '.join(map(str, images))}; try the data as they were, or a new run with --weights"
            )
        _move(state, values["recipe"]["batch_size"], batches)
    except CheckpointError:
        raise
    except (Exception, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"expected a checkpoint of this run at {path}, got {first_line(error)}; try a new run without --resume"
        ) from error
    return values["recipe"]


def _move(state: "TrainState", batch_size: int, batches: "Batches") -> None:
    """Find the place after the same images in batches of another size."""
    epoch, done = divmod(state.place, batches.updates_of(batch_size))
    seen = done * batch_size
    done, rest = divmod(seen, batches.batch_size)
    if rest or done >= batches.updates:
        raise CheckpointError(
            f"--batch-size: expected a divisor of the {seen} images of epoch {epoch + 1} so far, got "
            f"{batches.batch_size}; try {batch_size} until the end of the epoch"
        )
    state.shift = state.update - epoch * batches.updates - done


def changes(now: Config, then: dict[str, Any]) -> dict[str, str]:
    """The options that a resumed run changes, but for those that leave its mathematics alone, and what to say."""
    values = recipe(now)
    changed = (key for key in values if key not in FREE_ON_RESUME and values[key] != then.get(key))
    return {key: f"--{key.replace('_', '-')} {values[key]} (was {then.get(key)})" for key in changed}


def check_recipe(now: Config, then: dict[str, Any], changeable: Collection[str] = ()) -> None:
    """Refuse to continue a run with options that would make it another run: others than `changeable` and the epochs."""
    changed = changes(now, then)
    if changed.keys() - {*changeable, "epochs"}:
        fixed = [key for key in recipe(now) if key not in ("epochs", *FREE_ON_RESUME, *OVERRIDABLE)]
        raise CheckpointError(
            f"expected the options of the run that --resume continues, got {', '.join(changed.values())}; try --resume "
            f"without them, a new run without --resume, or --override, which changes all but {', '.join(fixed)}"
        )


def _type_name(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"expected plain values in an optimizer's state, got {shown(value)}; try another --opt")


def _like(template: Any, value: Any) -> Any:
    """JSON knows neither tuples nor types; optimizers do. A type is no state: it is what the options say."""
    if isinstance(template, torch.dtype):
        return template
    return tuple(value) if isinstance(template, tuple) else value
