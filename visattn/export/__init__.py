"""Export a model to a file of another runtime, verified against PyTorch before it gets its name.

Sources: ONNX (onnx.ai), `torch.export` and AOTInductor (docs.pytorch.org), OpenVINO (docs.openvino.ai), ExecuTorch
(docs.pytorch.org/executorch).
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import visattn
from visattn.export.program import DYNAMIC, MOST, Dynamic, least_size, trace
from visattn.export.targets import TARGETS, Exported, Metadata
from visattn.ops.checks import one_int, per_axis

__all__ = ["TARGETS", "ExportError", "Exported", "Report", "export", "load"]


class ExportError(RuntimeError):
    """A model that a target cannot take, or a file that does not compute what the model does; the message says why."""


@dataclass(frozen=True)
class Report:
    """What `export` did.

    Attributes:
        path: The file; an OpenVINO model has a .bin, an ONNX model of more than 1.5 GB a .data beside it.
        target: One of `TARGETS`.
        dynamic: Which sizes may change: "none", "batch", or "size": batch, height and width.
        least: Smallest side in pixels, if height and width may change.
        said: Opset, backend, or what the file is bound to.
        size: Bytes of all its files.
        seconds: Time of tracing, converting and verifying.
        peak_memory: Bytes that the process held at most until now; None where the system does not tell.
        errors: By the shape of an image, |file - PyTorch| / |PyTorch| over all outputs.
    """

    path: Path
    target: str
    dynamic: Dynamic
    least: int | None
    said: str
    size: int
    seconds: float
    peak_memory: int | None
    errors: dict[tuple[int, ...], float]

    def __str__(self) -> str:
        memory = "" if self.peak_memory is None else f", {self.peak_memory / 2**30:.1f} GiB at most"
        least = "" if self.least is None else f", sides of {self.least} to {MOST} px"
        lines = [
            f"{self.path}: {self.target}{self.said and f' ({self.said})'}, {self.size / 1e6:.1f} MB",
            f"dynamic: {self.dynamic}{least}; {self.seconds:.0f} s{memory}",
            *(f"{'x'.join(map(str, shape))}: {error:.1e} from PyTorch" for shape, error in self.errors.items()),
        ]
        return "\n".join(lines)


def _target_of(path: Path, target: str | None) -> str:
    """Name the target: the one given, else the one that the file's suffix means."""
    suffixes = {t.suffix: name for name, t in reversed(TARGETS.items())}
    if target is None:
        target = next((name for suffix, name in suffixes.items() if path.name.endswith(suffix)), None)
    if target not in TARGETS:
        known = ", ".join(f"{name!r} ({t.suffix})" for name, t in TARGETS.items())
        raise ValueError(f"expected a target of {known}, got {target or path.name!r}; try 'onnx'")
    if not path.name.endswith(end := "." + TARGETS[target].suffix.rpartition(".")[2]):
        raise ValueError(f"expected a file {end} for target {target!r}, got {path.name!r}")
    missing = [pip for name, pip in TARGETS[target].packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        extra = "executorch" if target == "executorch" else "export"
        names = ", ".join(missing)
        raise ImportError(f"{target}: expected {names} installed, got none; try `pip install 'visattn[{extra}]'`")
    return target


def _metadata(
    model: nn.Module, labels: Sequence[str] | None, dynamic: Dynamic, least: int | None, image: Tensor
) -> Metadata:
    """Gather what a user of the file must know besides it."""
    configuration = timm.data.resolve_data_config({}, model=model)
    known: dict[str, Any] = vars(model).get("pretrained_cfg") or {}
    classes = getattr(model, "num_classes", None)
    if labels is None:
        labels = known.get("label_names") or []
        labels = labels if len(labels) == classes else []  # the classifier may be another than the weights came with
    elif isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"expected labels as a list of strings, got {labels!r:.80}")
    elif classes not in (None, len(labels)):
        raise ValueError(f"expected {classes} labels, one per class, got {len(labels)}")
    keys = "mean", "std", "interpolation", "crop_pct", "crop_mode"
    may_change = {"none": [], "batch": ["batch"], "size": ["batch", image.shape[1], "height", "width"]}[dynamic]
    return {
        "model": known.get("architecture", type(model).__name__),
        "visattn": visattn.__version__,
        "torch": torch.__version__,
        "image": f"float32 [B, C, H, W]{', RGB' if image.shape[1] == 3 else ''}, (x / 255 - mean) / std",
        "shape": [*may_change, *image.shape[len(may_change) :]],  # of images; a name in the place of what may change
        "input_size": list(image.shape[1:]),  # of the example
        **{key: configuration[key] for key in keys},
        "labels": list(labels),
        "dynamic": dynamic,
        "least": least,
    }


def _cause(error: BaseException) -> str:
    """Take from a chain of errors what says why: the first of visattn's own, else the beginning of the last."""
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    for link in chain:
        if isinstance(link, (NotImplementedError, ValueError)) and "expected" in str(link):
            return str(link)
    said = " ".join(str(chain[-1]).split())
    return f"{type(chain[-1]).__name__}: {said[:400]}"


def _shapes(image: Tensor, dynamic: Dynamic, least: int) -> list[tuple[int, ...]]:
    """List the shapes to verify, batch 1 among them unless the batch is fixed."""
    batch, channels, *side = image.shape
    if dynamic == "none":
        return [(batch, channels, *side)]
    if dynamic == "batch":
        return [(b, channels, *side) for b in (1, 2, 3)]
    sizes = (1, least, least + 14), (2, 97, 131), (1, 256, 64), (3, 224, 160), (1, *side)
    return [(b, channels, max(h, least), max(w, least)) for b, h, w in sizes]


@torch.no_grad()
def _verify(model: nn.Module, run: Exported, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Measure |file - model| / |model| for images of each shape."""
    errors, generator = {}, torch.Generator().manual_seed(0)
    for shape in shapes:
        image = torch.randn(shape, generator=generator)
        expected, got = tree_leaves(model(image)), run(image)
        pairs = list(zip(expected, got, strict=True))
        if any(x.shape != y.shape for x, y in pairs):
            shown = [list(y.shape) for y in got], [list(x.shape) for x in expected]
            raise ExportError(f"expected outputs {shown[1]} for an image {list(shape)}, got {shown[0]}")
        off = float(sum((y.double() - x.double()).square().sum() for x, y in pairs))
        norm = float(sum(x.double().square().sum() for x in expected))
        errors[shape] = (off / norm if norm else off) ** 0.5  # all zeros from a classifier that begins with them
    return errors


def _made_with(model: nn.Module, argument: str, default: Any) -> Any:
    """Find what a model was made with, which timm's configuration of its weights does not tell."""
    return next((value for m in model.modules() if (value := getattr(m, argument, None))), default)


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model to run it on the CPU, without gradients; refuse wrappers that are none of their own."""
    inner: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    name = type(inner).__name__
    try:
        copied = copy.deepcopy(inner).cpu().eval().requires_grad_(False)
    except Exception as error:  # of TorchScript, FSDP, weight_norm
        got = f"{name} ({_cause(error)})"
        raise TypeError(f"expected a model to copy, got {got}; try a new model with its state_dict") from error
    arguments = [*inspect.signature(copied.forward).parameters.values()]
    if not arguments or arguments[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        raise TypeError(f"expected a model whose forward takes images, got a wrapper, {name}; try model.module")
    return copied


def _folder_near(path: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a folder from which files can be moved to `path`, in the nearest of its folders that exists."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        return tempfile.TemporaryDirectory(dir=nearest, prefix=".export-")
    except OSError as error:
        got = f"{nearest} ({error.strerror})"
        raise type(error)(f"expected a folder to write {path.name} in, got {got}; try another") from error


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def export(
    model: nn.Module,
    path: str | Path,
    target: str | None = None,
    *,
    dynamic: Dynamic = "batch",
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    labels: Sequence[str] | None = None,
    opset: int | None = None,
    tolerance: float = 1e-5,
) -> Report:
    """Write a model to `path` as another runtime reads it, once the file has computed what PyTorch does.

    The model is copied; the copy is put in evaluation mode on the CPU. The file appears under its name, replacing an
    older one, only when it was verified; a failure leaves nothing behind.

    Args:
        model: Any model for images [B, C, H, W], float32, with one output or a nest of them.
        path: File to write; folders are made.
        target: One of `TARGETS`: "onnx", "openvino", "pt2" (`torch.export`), "aoti" (AOTInductor, needs a C++
            compiler), "executorch" (XNNPACK where it takes the model, else portable kernels). Default: by the suffix.
        dynamic: Sizes that may change when the file is run: "none", "batch", or "size": batch, height and width.
        image_size: Height and width in pixels, or one number for both, of a file with a fixed size, and of the example
            of one with a dynamic size. Default: the model's own.
        batch_size: Images at a time, with `dynamic="none"`.
        labels: Names of the classes, kept in the file. Default: those that the model's weights came with.
        opset: Version of ONNX's operators. Default: PyTorch's choice.
        tolerance: Largest accepted error relative to the output's norm.

    Returns:
        What was written and measured. `load(path)` runs the file.

    Raises:
        ValueError: An unknown target or suffix, a size below the minimum, labels that do not fit, a file of something
            else where OpenVINO's .bin belongs.
        TypeError: A model whose parameters are not float32, no model, or one in a wrapper such as `DataParallel`;
            labels that are no strings.
        OSError: No file can be written there.
        ImportError: A package of the target is not installed.
        ExportError: The target cannot take the model, or the file's results differ from PyTorch's; with the reason.
    """
    start, path = time.perf_counter(), Path(path)
    target = _target_of(path, target)
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the folder {path}; try another name")
    beside = TARGETS[target].beside and path.with_suffix(TARGETS[target].beside)
    if beside and beside.exists() and not path.exists():
        raise ValueError(f"expected no {beside}, which belongs to another file, got one; try another name")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; try timm.create_model(name)")
    if dynamic not in DYNAMIC:
        raise ValueError(f"expected dynamic of {', '.join(map(repr, DYNAMIC))}, got {dynamic!r}")
    if dynamic != "none" and (why := TARGETS[target].only_fixed):
        raise ValueError(f"{target}: expected fixed sizes, as {why}, got dynamic={dynamic!r}; try dynamic='none'")
    if dtypes := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise TypeError(f"expected parameters of torch.float32, got {dtypes.pop()}; try model.float()")
    if any(x.is_meta for x in (*model.parameters(), *model.buffers())):
        raise ValueError("expected weights, got a model on the meta device; try to make it with device='cpu'")
    if opset is not None and "onnx" not in TARGETS[target].packages:
        raise ValueError(f"expected an opset with target 'onnx' or 'openvino' only, got {opset!r} for {target!r}")
    if not tolerance >= 0:  # NaN too
        raise ValueError(f"expected tolerance >= 0, got {tolerance}")
    if (batch_size := one_int("batch_size", batch_size)) < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if batch_size > 1 and dynamic != "none":
        raise ValueError(f"expected batch_size with dynamic='none' only, got {batch_size} for dynamic={dynamic!r}")
    model = _copied(model)
    channels, *side = timm.data.resolve_data_config({}, model=model)["input_size"]
    channels = _made_with(model, "in_chans", channels)
    side = per_axis("image_size", _made_with(model, "img_size", side) if image_size is None else image_size, int, 2)
    least = least_size(model, channels) if dynamic == "size" else None
    if min(side) < (least or 1) or max(side) > MOST:
        raise ValueError(f"expected sides of {least or 1} to {MOST} px, got {side[0]}x{side[1]}")
    # PyTorch takes a dynamic size that is 1 in the example for always 1.
    image = torch.randn(batch_size if dynamic == "none" else 2, channels, *side)
    metadata = _metadata(model, labels, dynamic, least, image)

    with _folder_near(path) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters about themselves
        written = Path(folder) / path.name
        options = {} if opset is None else {"opset_version": opset}
        try:
            program = trace(model, image, dynamic, least or 1)
            said = TARGETS[target].save(program, written, metadata, options)
            errors = _verify(model, TARGETS[target].load(written), _shapes(image, dynamic, least or 1))
        except Exception as error:
            what = f"{metadata['model']} with dynamic={dynamic!r} at {side[0]}x{side[1]}"
            raise ExportError(f"{target}: expected to export {what}, got {_cause(error)}") from error
        if wrong := [(error, shape) for shape, error in errors.items() if not error <= tolerance]:  # NaN too
            error, shape = max(wrong)
            raise ExportError(
                f"{target}: expected results within {tolerance:.0e} of PyTorch's, got {error:.1e} for an image "
                f"{list(shape)}; try a larger tolerance if that is enough for you"
            )
        files = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)  # what others need first
        size = sum(file.stat().st_size for file in files)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(file, path.parent / file.name)
    return Report(path, target, dynamic, least, said, size, time.perf_counter() - start, _peak_memory(), errors)


def load(path: str | Path, target: str | None = None) -> Exported:
    """Read a file that `export` wrote, to run it on the CPU.

    Args:
        path: The file.
        target: What it was written for; default: by the suffix.

    Raises:
        ValueError, ImportError: As `export`.
        FileNotFoundError: There is no such file.
        ExportError: It holds something else.
    """
    path = Path(path)
    target = _target_of(path, target)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of `visattn.export.export`, got none at {path}")
    try:
        return TARGETS[target].load(path)
    except Exception as error:
        got = f"{path}: {_cause(error)}"
        raise ExportError(f"{target}: expected a file of `visattn.export.export`, got {got}") from error
