"""Checkpoints: exact resume, files that are whole or not there, nothing unpickled."""

import csv

import pytest
import safetensors.torch
import timm
import torch
import yaml

from train import checkpoint, metrics
from train.errors import CheckpointError

# Every source of randomness at once: shuffling, crops, erasing, mixing, stochastic depth.
STOCHASTIC = ("--img-size", 32, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1)
STOCHASTIC += ("--mixup", 0.8, "--cutmix", 1, "--reprob", 0.5, "--drop-path", 0.2, "--layer-decay", 0.8)


def without_times(log):
    with open(log) as file:
        return [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in csv.DictReader(file)]


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("images_per_s", "seconds", "run", "workers"):
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bitwise_the_uninterrupted_run(folder_data, run, monkeypatch, workers):
    options = ("--data", folder_data, *STOCHASTIC, "--workers", workers)
    code, whole = run("whole", *options)
    assert code == 0

    steps = 0

    def stop_in_the_third_epoch(bar, meter, lr):
        nonlocal steps
        steps += 1
        if steps == 2 * 4 + 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.EpochBar, "step", stop_in_the_third_epoch)
        code, parts = run("parts", *options)
    assert code == 130
    assert checkpoint.load(parts / "last.pt")["progress"]["epoch"] == 2

    torch.rand(7)  # a new process would not be where the old one stopped
    code, _ = run("parts", "--resume", parts)
    assert code == 0
    assert_same(checkpoint.load(whole / "last.pt"), checkpoint.load(parts / "last.pt"))
    assert without_times(whole / "log.csv") == without_times(parts / "log.csv")
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_resume_refuses_other_options_and_reports_a_complete_run(folder_data, run, capsys):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0)
    code, folder = run("r", *options)
    assert code == 0
    code, _ = run("r", "--resume", folder / "last.pt", "--lr", 0.01, "--epochs", 2)
    assert code == 2
    assert "got --epochs 2 (was 1), --lr 0.01 (was 0.002); try --resume without them" in capsys.readouterr().err
    code, _ = run("r", "--resume", folder)
    assert code == 0
    assert "test accuracy" in capsys.readouterr().out
    code, _ = run("r", *options)
    assert code == 2
    assert "which exists; try --resume" in capsys.readouterr().err
    assert yaml.safe_load((folder / "args.yaml").read_text())["img_size"] == 32


class Payload:
    """Pickles to a call of `open(canary, 'w')`."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    canary = tmp_path / "canary"
    parts = {**{key: {} for key in checkpoint.PARTS}, "model": Payload(canary)}
    torch.save(parts, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of plain tensors .*, got .*; try "):
        checkpoint.load(tmp_path / "last.pt")
    assert not canary.exists()
    # The payload does work where it is let in: otherwise this test would prove nothing.
    torch.load(tmp_path / "last.pt", weights_only=False)["model"].close()
    assert canary.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or unsafe"):
            checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="got other contents"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="got no file"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.write_atomic(path, b"old")

    def die(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, die)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_exported_weights_give_the_same_logits(folder_data, run):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0)
    _, folder = run("r", *options, "--in-chans", 1, model="test_convnext")
    arguments = {"num_classes": 2, "in_chans": 1}
    exported = timm.create_model("test_convnext", checkpoint_path=folder / "model.safetensors", **arguments).eval()
    trained = timm.create_model("test_convnext", **arguments).eval()
    trained.load_state_dict(checkpoint.load(folder / "last.pt")["model"])
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(exported(images), trained(images))
    untrained = timm.create_model("test_convnext", **arguments).eval()
    assert not torch.equal(exported(images), untrained(images))
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == set(trained.state_dict())
