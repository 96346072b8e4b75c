"""Files that are whole or not there, that notice every changed bit, and that never run what they hold."""

import hashlib
import random

import pytest
import safetensors.torch
import timm
import torch
import yaml
from runs import SMALL, newest, rows, slow

from visattn.train import checkpoint
from visattn.train.errors import CheckpointError
from visattn.train.files import write_atomic
from visattn.train.weights import load_weights


def test_resume_refuses_other_options_and_reports_a_complete_run(finished, run, capsys):
    code, _ = run("r", "--resume", finished, "--lr", 0.01, "--epochs", 2)
    assert code == 2
    assert "got --epochs 2 (was 1), --lr 0.01 (was 0.002); try --resume without them" in capsys.readouterr().err
    code, _ = run("r", "--resume", newest(finished))
    assert code == 0
    assert "test accuracy" in capsys.readouterr().out
    code, _ = run("r")
    assert code == 2
    assert "which exists; try --resume" in capsys.readouterr().err
    assert yaml.safe_load((finished / "args.yaml").read_text())["img_size"] == 32
    code, _ = run("none", "--resume", finished.parent / "none")
    assert code == 2
    assert "expected a run folder, got no args.yaml" in capsys.readouterr().err


def test_a_kill_between_checkpoint_and_log_loses_no_row(finished, run):
    log = (finished / "log.csv").read_text()
    (finished / "log.csv").unlink()
    assert run("r", "--resume", finished)[0] == 0
    assert (finished / "log.csv").read_text() == log


def test_the_newest_checkpoints_stay(folder_data, run):
    _, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 2, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["00000006", "00000007", "00000008"]
    assert not (folder / "checkpoints" / "00000004").exists()


def test_a_damaged_checkpoint_is_passed_over(folder_data, run, capsys):
    _, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 2)
    state = newest(folder) / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    code, _ = run("r", "--resume", folder)
    assert code == 0
    output = capsys.readouterr().out
    assert "warning: expected a whole checkpoint at" in output
    assert "state.json has changed" in output
    assert "resumed after update 4\n" in output
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_bytes(b"")
    assert run("r", "--resume", folder)[0] == 2
    assert "expected a whole checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("trials", [200, slow(1000)])
def test_every_flipped_bit_is_noticed(finished, trials):
    """In every file of a checkpoint and in exported weights."""
    path, rng, caught = newest(finished), random.Random(0), 0
    files = [(file, checkpoint.verify, path) for file in path.iterdir()]
    exported = finished / "model.safetensors"
    files += [
        (exported, load_weights, exported),
        (exported.with_name("model.safetensors.sha256"), load_weights, exported),
    ]
    checkpoint.verify(path)
    load_weights(exported)
    for trial in range(trials):
        file, check, argument = files[trial % len(files)]
        content = bytearray(file.read_bytes())
        # Of the hash file beside exported weights only the hash counts, not the name that follows it.
        place = rng.randrange(64 if file.suffix == ".sha256" else len(content))
        content[place] ^= 1 << rng.randrange(8)
        good = file.read_bytes()
        file.write_bytes(content)
        try:
            check(argument)
        except CheckpointError:
            caught += 1
        file.write_bytes(good)
    assert caught == trials
    checkpoint.verify(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../b"])
def test_listed_names_stay_in_the_folder(finished, name):
    path = newest(finished)
    with open(path / "SHA256SUMS", "a") as sums:
        sums.write(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        checkpoint.verify(path)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def die(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, die)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["write", "finish"])
def test_a_full_disk_does_not_end_the_run(folder_data, run, monkeypatch, capsys, fails):
    """The checkpoint after epoch 1 cannot be written, the later ones can."""
    target = (checkpoint.dcp, "save") if fails == "write" else (checkpoint, "sha256")
    real, calls = getattr(*target), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(*target, full)
    code, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 2)
    assert code == 0
    assert "No space left on device; try another --output, or make room; training goes on" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000008"]
    checkpoint.verify(newest(folder))


def test_a_run_that_cannot_keep_its_result_says_so(folder_data, run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    code, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 1)
    assert code == 2
    assert "No space left" in capsys.readouterr().err
    assert len(rows(folder)) == 1  # of the weights that are there


def test_exported_weights_give_the_same_logits(folder_data, run):
    _, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 1, "--in-chans", 1, model="test_convnext")
    arguments = {"num_classes": 2, "in_chans": 1}
    exported = timm.create_model("test_convnext", checkpoint_path=folder / "model.safetensors", **arguments).eval()
    trained = timm.create_model("test_convnext", **arguments).eval()
    shard = safetensors.torch.load_file(next(newest(folder).glob("*.safetensors")))
    trained.load_state_dict({k.removeprefix("model."): v for k, v in shard.items() if k.startswith("model.")})
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(exported(images), trained(images))
    untrained = timm.create_model("test_convnext", **arguments).eval()
    assert not torch.equal(exported(images), untrained(images))
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == set(trained.state_dict())
