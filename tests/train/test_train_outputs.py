"""Full disks, deleted folders, kills between two files: what a run leaves fits together, or it says what does not."""

import dataclasses
import datetime
import errno
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import PLAIN, SMALL, assert_same_tensors, build, column, newest, rows

from visattn.train import checkpoint, engine, files, outputs, weights
from visattn.train.arguments import parse
from visattn.train.config import Config
from visattn.train.errors import CheckpointError, ConfigError
from visattn.train.lock import FolderLock
from visattn.train.metrics import make_console
from visattn.train.outputs import open_folder


class Killed(BaseException):
    """Nothing after it is done, clean-up included."""


class Disk:
    """Lets system calls fail: those for which `fails(call, file name)` gives an error."""

    def __init__(self, monkeypatch):
        self.fails, self.failed = lambda call, name: None, 0
        for name in ("fsync", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._watch(name, getattr(os, name)))
        monkeypatch.setattr(files, "open", self._watch("open", open), raising=False)

    def _watch(self, call, real):
        def watched(target, *args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{target}") if call == "fsync" else str(target)
            if error := self.fails(call, os.path.basename(path)):
                self.failed += 1
                raise error
            return real(target, *args, **kwargs)

        return watched

    def fail(self, call, name, code=errno.ENOSPC, times=1, when=lambda: True):
        """The next `times` of these calls fail."""

        def fails(*got):
            if got == (call, name) and self.failed < times and when():
                return OSError(code, os.strerror(code))
            return None

        self.fails = fails

    def each_step(self, action, error, stride=1):
        """Do `action` with a failure at its first call, its second, ... until it meets none; yields after each."""
        for step in itertools.count(step=stride):
            self.failed, counter = 0, itertools.count()

            def fails(call, name, step=step, counter=counter):
                now = next(counter)
                if error is Killed:
                    return Killed() if now >= step else None
                return OSError(error, os.strerror(error)) if now == step else None

            self.fails = fails
            try:
                action()
            except (OSError, CheckpointError, Killed):
                assert self.failed
            self.fails = lambda call, name: None
            if not self.failed:
                break
            yield
        assert step > 3


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def scores(monkeypatch):
    """Let the evaluations of a run have these top-1, and do something `at` one of them; collects what was evaluated."""

    def script(*tops, at=0, do=None):
        seen, real = [], engine.Engine.evaluate

        def evaluate(self, ema=False):
            result = real(self, ema)
            seen.append({key: value.clone() for key, value in self.model.state_dict().items()})
            if len(seen) == at:
                do()
            return {**result, "top1": tops[len(seen) - 1]}

        monkeypatch.setattr(engine.Engine, "evaluate", evaluate)
        return seen

    return script


@pytest.fixture
def three(folder_data, run):
    """A run of three epochs."""
    return lambda *options: run("r", "--data", folder_data, *PLAIN, "--epochs", 3, *options)


def held(folder, seen):
    """Which of the evaluated models model.safetensors holds, counted from 1; loading it checks its hash."""
    found = weights.load_weights(folder / "model.safetensors")
    return 1 + [all(torch.equal(found[key], model[key]) for key in found) for model in seen].index(True)


def best_of(folder):
    """What the last checkpoint says of the exported weights."""
    return json.loads((newest(folder) / "state.json").read_text())["progress"]["best"]


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


PLACES = [(call, ".model.safetensors.tmp") for call in ("open", "fsync", "replace")]
PLACES += [(call, ".model.safetensors.sha256.tmp") for call in ("fsync", "replace")]
CODES = (errno.EROFS, errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)


@pytest.mark.parametrize(("call", "name", "code"), [(*place, code) for place, code in zip(PLACES, CODES, strict=True)])
def test_one_failure_does_not_lose_the_best_weights(three, capsys, disk, scores, call, name, code):
    """At the export of the best epoch, which a worse one follows."""
    seen = scores(50.0, 90.0, 70.0)
    disk.fail(call, name, code, when=lambda: len(seen) == 2)
    exit_code, folder = three()
    output = capsys.readouterr()
    assert disk.failed == 1
    assert exit_code == 0, output.err
    assert held(folder, seen) == 2
    assert best_of(folder) == {"model": 90.0}
    assert (folder / "model.safetensors.sha256").exists()
    assert not hidden(folder)
    assert "warning: not written: " in output.out
    assert name.removeprefix(".").removesuffix(".tmp") in output.out


@pytest.mark.parametrize(
    ("name", "last_is_best"), [(".model.safetensors.tmp", False), (".model.safetensors.sha256.tmp", True)]
)
def test_weights_that_cannot_be_written_are_said_at_the_end(three, run, capsys, disk, scores, name, last_is_best):
    """All after the first epoch fails; with room again, a resume writes the best weights that are left."""
    seen = scores(50.0, *((70.0, 90.0) if last_is_best else (90.0, 70.0)))
    disk.fail("fsync", name, times=100, when=lambda: len(seen) > 1)
    code, folder = three()
    assert code == 2
    assert "got no model.safetensors of 90.00 % top-1 but one of 50.00 %; try " in capsys.readouterr().err
    assert held(folder, seen) == 1
    assert best_of(folder) == {"model": 50.0}
    assert len(rows(folder)) == 3
    disk.fails = lambda call, name: None
    code, _ = run("r", "--resume", folder)
    assert code == (0 if last_is_best else 2)
    assert held(folder, seen) == 3  # better than the first, in any case
    assert best_of(folder) == {"model": 90.0 if last_is_best else 70.0}


def test_a_failure_at_the_last_export_is_made_good_at_the_end(three, disk, scores):
    seen = scores(50.0, 70.0, 90.0)
    disk.fail("fsync", ".model.safetensors.tmp", times=2, when=lambda: len(seen) == 3)
    code, folder = three()
    assert code == 0
    assert held(folder, seen) == 3
    assert best_of(folder) == {"model": 90.0}


@pytest.mark.parametrize(("name", "times"), [("log.csv", 100), ("curves.png", 1), ("curves.png", 100)])
def test_a_missing_log_or_picture_is_made_good_or_said(three, capsys, disk, scores, name, times):
    seen = scores(50.0, 60.0, 70.0)
    disk.fail("replace", f".{name}.tmp", times=times, when=lambda: len(seen) == 3)
    code, folder = three()
    output = capsys.readouterr()
    assert output.out.count(f"warning: not written: [Errno {errno.ENOSPC}]") == 1
    assert name in output.out
    if times == 1:
        assert code == 0
        assert (folder / name).exists()
    else:
        assert code == 2
        assert f"error: expected all files of a finished run in {folder}, got no {name}; try " in output.err


def fill_disk():
    """No rank can export weights."""
    real = open

    def full(path, *args, **options):
        if os.path.basename(path) == ".model.safetensors.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **options)

    files.open = full


def test_all_ranks_know_what_could_not_be_written(folder_data, launch):
    """Otherwise one would wait for the others to gather its shards for an export."""
    options = ("--data", folder_data, *PLAIN, "--epochs", 2, "--engine", "fsdp2")
    processes = launch(*options, size=2, change=fill_disk)
    assert processes.wait() == [2, 2], processes.output()
    assert processes.output().count("error: ") == 1
    assert "got no model.safetensors of " in processes.output()


@pytest.mark.parametrize("error", [errno.ENOSPC, Killed])
def test_exported_weights_and_their_hash_fit_after_a_failure_at_any_step(tmp_path, disk, error):
    path = tmp_path / "model.safetensors"
    old, new = ({"a": torch.full((4,), value)} for value in (1.0, 2.0))
    weights.export(path, old)
    for _ in disk.each_step(lambda: weights.export(path, new), error):
        assert weights.load_weights(path)["a"][0].item() in (1, 2)  # checks the hash
        weights.export(path, old)
        assert weights.load_weights(path)["a"][0].item() == 1
        assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "model.safetensors.sha256"]


def test_a_reader_takes_weights_that_are_replaced_while_it_reads(tmp_path, monkeypatch):
    """`train.validate` on a running run."""
    path, real, later = tmp_path / "model.safetensors", weights.sha256, [1]

    def slow(file):
        if later:
            weights.export(path, {"a": torch.full((4,), float(later.pop()))})
        return real(file)

    weights.export(path, {"a": torch.zeros(4)})
    monkeypatch.setattr(weights, "sha256", slow)
    assert weights.load_weights(path)["a"][0].item() == 1


@pytest.mark.parametrize("error", [errno.EIO, Killed])
def test_a_checkpoint_written_anew_is_there_after_a_failure_at_any_step(folder_data, tmp_path, disk, error):
    """The same update again, as after a damaged one."""
    run = build("--model", "test_vit", "--data", folder_data, *SMALL, "--output", tmp_path, "--name", "r")

    def save():
        checkpoint.save(run.folder, run.state, run.config, run.world)

    for run.state.update in (7, 8):
        save()
    for _ in disk.each_step(save, error):
        checkpoint.sweep(run.folder)
        assert checkpoint.newest(run.folder, make_console(enabled=False)).name == "00000008"
        assert not hidden(run.folder / "checkpoints")


@pytest.mark.slow
def test_a_run_killed_at_every_third_step_of_its_writing_is_the_uninterrupted_one(folder_data, run, disk):
    options = ("--data", folder_data, *PLAIN, "--epochs", 2, "--ema-decay", 0.9, "--keep-checkpoints", 1)
    _, whole = run("whole", *options)
    folder = whole.with_name("killed")
    for _ in disk.each_step(lambda: run("killed", *options), Killed, stride=3):
        if (folder / "args.yaml").exists():
            assert run("killed", "--resume", folder)[0] == 0
            assert_same_tensors(whole, folder)
            assert best_of(whole) == best_of(folder)
            assert [column(whole, key) for key in LOSSES] == [column(folder, key) for key in LOSSES]
            for name in ("model.safetensors", "model_ema.safetensors"):
                assert (whole / name).read_bytes() == (folder / name).read_bytes()
                assert (whole / f"{name}.sha256").read_text() == (folder / f"{name}.sha256").read_text()
            assert not hidden(folder)
        shutil.rmtree(folder)


def test_pruning_counts_no_damaged_checkpoint(folder_data, tmp_path):
    """A resumed run passed over the newest one: what it writes itself must stay."""
    run = build("--model", "test_vit", "--data", folder_data, *SMALL, "--output", tmp_path, "--name", "r")
    (run.folder / "checkpoints" / "00000009").mkdir(parents=True)
    run.state.update = 3
    checkpoint.save(run.folder, run.state, dataclasses.replace(run.config, keep_checkpoints=1), run.world)
    assert checkpoint.newest(run.folder, make_console(enabled=False)).name == "00000003"


def test_a_resumed_run_sweeps_what_a_kill_has_left(finished, run):
    checkpoints = finished / "checkpoints"
    shutil.copytree(newest(finished), checkpoints / ".00000000.old")
    shutil.move(newest(finished), checkpoints / ".00000001.tmp")  # whole: only its name is missing
    (checkpoints / ".00000009.tmp").mkdir()
    for name in (".model.safetensors.tmp", ".log.csv.tmp", ".args.yaml.tmp", ".wandb_id.txt.tmp"):
        (finished / name).write_bytes(b"half")
    assert run("r", "--resume", finished)[0] == 0
    assert not hidden(finished)
    assert os.listdir(checkpoints) == ["00000001"]


LOSSES = ("train_loss", "eval_loss", "top1", "ema_loss", "ema_top1")
PROMISED = sorted([*outputs.PROMISED, "checkpoints", "model.safetensors", "model.safetensors.sha256"])
BEGUN = ["first_batch.png"]  # written once


@pytest.mark.parametrize(("tops", "code"), [((50.0, 60.0, 90.0), 0), ((90.0, 50.0, 60.0), 2)])
def test_a_folder_deleted_during_a_run_is_written_anew(three, run, tmp_path, capsys, scores, tops, code):
    """Or, if the best weights went with it, the run says so at its end."""
    folder = tmp_path / "out" / "r"
    seen = scores(*tops, at=2, do=lambda: shutil.rmtree(folder))
    assert three()[0] == code
    output = capsys.readouterr()
    assert f"warning: files in {folder} have been deleted" in output.out
    assert ("got no model.safetensors of 90.00 % top-1 but one of 60.00 %; try " in output.err) == (code == 2)
    assert sorted(os.listdir(folder)) == PROMISED
    assert len(rows(folder)) == 3
    assert held(folder, seen) == 3
    assert run("r", "--resume", folder)[0] == code


@pytest.mark.parametrize("name", ["log.csv", "model.safetensors"])
def test_a_file_deleted_from_a_run_is_written_anew(finished, run, name):
    (finished / name).unlink()
    assert run("r", "--resume", finished)[0] == 0
    assert sorted(os.listdir(finished)) == sorted(PROMISED + BEGUN)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(outputs, "datetime", Clock)
    config = Config(output=tmp_path / "out", model="test_vit")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: open_folder(config, "x", FolderLock(), make_console(enabled=False)), range(40)))
    first = "test_vit-x-20300102-030405"
    assert sorted(path.name for path in found) == sorted([first, *(f"{first}-{n}" for n in range(2, 41))])
    assert all((path / "args.yaml").exists() for path in found)


def odd_output(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "file":
        path.write_text("")
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere" / "else")
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "read-only":
        path = "/proc/self/odd"
    return path


@pytest.mark.parametrize("kind", ["file", "link loop", "dangling link", "long", "read-only"])
@pytest.mark.parametrize("options", [(), ("--name", "r"), ("--name", "r", "--resume", "auto"), ("--resume",)])
def test_an_output_that_takes_no_files_is_refused(tmp_path, kind, options):
    path = odd_output(tmp_path, kind)
    where = ("--resume", path) if options == ("--resume",) else ("--output", path, *options)
    with pytest.raises((ConfigError, CheckpointError), match=r"expected .*, got.*; try "):
        open_folder(parse([str(option) for option in where]), "x", FolderLock(), make_console(enabled=False))


def test_a_disk_that_is_full_at_the_start_is_said(folder_data, refused, tmp_path, disk):
    disk.fail("fsync", ".args.yaml.tmp")
    assert "error: --output: expected a folder to write to, got: [Errno 28] No space left on device: " in refused()
    assert not hidden(tmp_path / "out")
    disk.fail("fsync", ".args.yaml.tmp", times=0)
    build("--model", "test_vit", "--data", folder_data, *SMALL, "--output", tmp_path / "out", "--name", "refused")
