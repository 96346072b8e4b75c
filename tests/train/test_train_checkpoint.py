"""Files that are whole or not there, that notice every changed bit, and that never run what they hold."""

import hashlib
import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml

from train import checkpoint
from train.errors import CheckpointError
from train.files import sha256, write_atomic
from train.metrics import make_console
from train.weights import load_weights

SHORT = ("--img-size", 32, "--batch-size", 8, "--warmup-epochs", 0)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run of one epoch on digits."""
    from train.__main__ import main

    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("template")
    options = ("--model", "test_vit", "--batch-size", 1437, "--warmup-epochs", 0, "--epochs", 1)
    assert main([*map(str, options), "--output", str(output), "--name", "r"]) == 0
    return output / "r"


@pytest.fixture
def finished(template, tmp_path):
    """A copy of that run."""
    return shutil.copytree(template, tmp_path / "out" / "r")


def newest(folder):
    return sorted((folder / "checkpoints").glob("[0-9]*"))[-1]


def seal(path):
    """Make SHA256SUMS fit whatever the folder now holds: the hashes must not be the only guard."""
    names = sorted(file.name for file in path.iterdir() if file.name != "SHA256SUMS")
    (path / "SHA256SUMS").write_text("".join(f"{sha256(path / name)}  {name}\n" for name in names))


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


def test_the_newest_checkpoints_stay(folder_data, run):
    _, folder = run("r", "--data", folder_data, *SHORT, "--epochs", 2, "--checkpoint-every", 1, "--keep-checkpoints", 3)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["00000006", "00000007", "00000008"]
    assert not (folder / "checkpoints" / "00000004").exists()


def test_a_damaged_checkpoint_is_passed_over(folder_data, run, capsys):
    _, folder = run("r", "--data", folder_data, *SHORT, "--epochs", 2)
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


def test_every_flipped_bit_is_noticed(finished):
    """1000 of 1000, in every file of a checkpoint and in exported weights."""
    path, rng, caught = newest(finished), random.Random(0), 0
    files = [(file, checkpoint.verify, path) for file in path.iterdir()]
    exported = finished / "model.safetensors"
    files += [
        (exported, load_weights, exported),
        (exported.with_name("model.safetensors.sha256"), load_weights, exported),
    ]
    checkpoint.verify(path)
    load_weights(exported)
    for trial in range(1000):
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
    assert caught == 1000
    checkpoint.verify(path)


class Payload:
    """Pickles to a call of `open(canary, 'w')`."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def header(entries):
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text)) + text


def pickled(payload, zipped=True):
    file = io.BytesIO()
    torch.save(payload, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def archive(kind):
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            info = tarfile.TarInfo("../../canary")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"bad"))
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("archive/data.pkl", bytes(10**8))
            bomb.writestr("archive/version", "3\n")
    return file.getvalue()


def object_array(payload):
    file = io.BytesIO()
    np.save(file, np.array([payload], dtype=object), allow_pickle=True)
    return file.getvalue()


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
# The twelve kinds of specs that a loader may meet.
PAYLOADS = {
    "zip pickle": lambda bad: pickled(bad),
    "legacy pickle": lambda bad: pickled(bad, zipped=False),
    "raw pickle": lambda bad: b"\x80\x04" + pickled(bad, zipped=False)[2:],
    "nested in state_dict": lambda bad: pickled({"state_dict": {"weight": torch.ones(1), "evil": bad}}),
    "tar": lambda bad: archive("tar"),
    "numpy object array": lambda bad: object_array(bad),
    "yaml object": lambda bad: b"!!python/object/apply:builtins.open [" + bad.canary.encode() + b", w]\n",
    "oversized header": lambda bad: struct.pack("<Q", 2**62) + b"{}",
    "negative offsets": lambda bad: header({"a": {**TENSOR, "data_offsets": [-4, 0]}}) + bytes(4),
    "duplicate keys": lambda bad: (
        header(b'{"a":' + json.dumps(TENSOR).encode() + b',"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
        + bytes(4)
    ),
    "zip bomb": lambda bad: archive("zip"),
    "link out of the folder": None,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_malicious_weights_are_refused_and_not_run(tmp_path, kind, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"weights{suffix}"
    if kind == "link out of the folder":
        os.symlink("/dev/zero", path)
    else:
        path.write_bytes(PAYLOADS[kind](Payload(canary)))
    with pytest.raises(CheckpointError, match=r"expected .*, got .*; try "):
        load_weights(path)
    assert not canary.exists()


def test_the_payload_works_where_it_is_let_in(tmp_path):
    """Otherwise the tests around it would prove nothing."""
    path = tmp_path / "weights.pth"
    path.write_bytes(PAYLOADS["zip pickle"](Payload(tmp_path / "canary")))
    torch.load(path, weights_only=False).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind in PAYLOADS for place in ("shard", "state.json", "args.yaml")]
    + [("raw pickle", ".metadata"), ("negative offsets", "new file"), ("link out of the folder", "new file")],
)
def test_malicious_checkpoints_are_refused_and_not_run(finished, run, tmp_path, capsys, kind, place):
    """With hashes that fit. A pickle beside the files, which torch's own reader would load, is not touched either."""
    canary, path = tmp_path / "canary", newest(finished)
    names = {
        "shard": next(path.glob("*.safetensors")).name,
        "args.yaml": "../../args.yaml",
        "new file": "x.safetensors",
    }
    target = path / names.get(place, place)
    target.unlink(missing_ok=True)
    if kind == "link out of the folder":
        (tmp_path / "outside").write_bytes(b"{}")
        os.symlink(tmp_path / "outside", target)
    else:
        target.write_bytes(PAYLOADS[kind](Payload(canary)))
    seal(path)
    code, _ = run("r", "--resume", finished)
    error = capsys.readouterr().err
    assert not canary.exists()
    if place == "args.yaml" and kind == "link out of the folder":
        return  # a run's own options may lie elsewhere; an empty file means all defaults, another run
    if place != ".metadata" or kind == "link out of the folder":
        assert code == 2
        assert "Traceback" not in error


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "a/../../b"])
def test_listed_names_stay_in_the_folder(finished, name):
    path = newest(finished)
    with open(path / "SHA256SUMS", "a") as sums:
        sums.write(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        checkpoint.verify(path)


def test_no_code_path_unpickles():
    """The words that would let a file run code do not occur in the trainer."""
    for path in sorted((checkpoint.Path(__file__).parents[2] / "train").glob("*.py")):
        text = path.read_text()
        for word in (
            "pickle.load",
            "weights_only=False",
            "yaml.load(",
            " eval(",
            "exec(",
            "shell=True",
            "allow_pickle=True",
        ):
            assert word not in text, (path.name, word)


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
    code, folder = run("r", "--data", folder_data, *SHORT, "--epochs", 2)
    assert code == 0
    assert "No space left on device; try another --output, or make room; training goes on" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000008"]
    checkpoint.verify(newest(folder))


def test_a_run_that_cannot_keep_its_result_says_so(folder_data, run, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    code, _ = run("r", "--data", folder_data, *SHORT, "--epochs", 1)
    assert code == 2
    assert "No space left" in capsys.readouterr().err


def test_exported_weights_give_the_same_logits(folder_data, run):
    _, folder = run("r", "--data", folder_data, *SHORT, "--epochs", 1, "--in-chans", 1, model="test_convnext")
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


def test_a_kill_while_pruning_leaves_no_half_checkpoint(finished):
    checkpoints = finished / "checkpoints"
    shutil.copytree(newest(finished), checkpoints / ".00000002.old")
    (checkpoints / ".00000009.tmp").mkdir()
    assert checkpoint.newest(finished, make_console()).name == "00000001"
