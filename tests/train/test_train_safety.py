"""Files made to do harm: refused with a clear error, and what they hold is never run."""

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import newest

from visattn.train.errors import CheckpointError
from visattn.train.files import sha256
from visattn.train.weights import load_weights


def seal(path):
    """Make SHA256SUMS fit whatever the folder now holds: the hashes must not be the only guard."""
    names = sorted(file.name for file in path.iterdir() if file.name != "SHA256SUMS")
    (path / "SHA256SUMS").write_text("".join(f"{sha256(path / name)}  {name}\n" for name in names))


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


def test_no_code_path_unpickles():
    """The words that would let a file run code do not occur in the trainer."""
    for path in sorted((Path(__file__).parents[2] / "visattn" / "train").glob("*.py")):
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
