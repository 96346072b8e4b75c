"""Files of weights and what is in them: refused as a whole, in words, before a tensor of the model has changed."""

import copy
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import visattn
from visattn.weights import WeightsError, load_weights

NAME = "test_coatnet_va"  # batch norms, whose counters are integers, and position tables
KEY = "head.fc.bias"
SMALL = visattn.list_models("test_*")


@pytest.fixture(scope="module")
def trained():
    return timm.create_model(NAME, num_classes=10)


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


def save(path, content, **options):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(content, path, **options)
    return path


def from_checkpoint_path(path, name=NAME, **options):
    return timm.create_model(name, checkpoint_path=str(path), **options)


def from_pretrained_file(path, name=NAME, **options):
    overlay = {"file": str(path), "num_classes": options.get("num_classes", 1000)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)


FROM_FILES = [lambda path: load_weights(Path(path)), from_checkpoint_path, from_pretrained_file]

UNFIT = {
    "unknown": (lambda s: {**s, "stages.9.weight": torch.ones(1)}, r"adds \['stages.9.weight'\]"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != KEY}, rf"lacks \['{KEY}'\]"),
    "shape": (lambda s: {**s, KEY: torch.ones(11)}, rf"size mismatch at {KEY}, \[11\] in place of \[10\]"),
    "scalar": (lambda s: {**s, KEY: torch.tensor(1.0)}, rf"size mismatch at {KEY}, \[\] in place of \[10\]"),
    "longer counter": (
        lambda s: {k: torch.ones(3, dtype=v.dtype) if "num_batches" in k else v for k, v in s.items()},
        "size mismatch at .*num_batches_tracked",
    ),
    "integers": (lambda s: {**s, KEY: s[KEY].long()}, rf"{KEY} of int64 in place of float32"),
    "bool": (lambda s: {**s, KEY: s[KEY] > 0}, rf"{KEY} of bool in place of float32"),
    "complex": (lambda s: {**s, KEY: s[KEY] + 1j}, rf"{KEY} of complex64 in place of float32"),
    "float8": (lambda s: {**s, KEY: s[KEY].to(torch.float8_e4m3fn)}, rf"{KEY} of float8_e4m3fn in place of float32"),
    "bool counter": (
        lambda s: {k: v > 0 if "num_batches" in k else v for k, v in s.items()},
        "num_batches_tracked of bool in place of int64 and",
    ),
    "sparse": (lambda s: {**s, KEY: s[KEY].to_sparse()}, rf"{KEY} of float32 sparse_coo in place of float32"),
    "meta": (lambda s: {**s, KEY: s[KEY].to("meta")}, rf"{KEY} of float32 without data in place of float32"),
    "no tensor": (lambda s: {**s, KEY: [0.0] * 10}, rf"{KEY} of list in place of float32"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_model_changes_only_if_everything_fits(model, kind, strict):
    change, message = UNFIT[kind]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = change({key: value + value.new_ones(()) for key, value in before.items()})
    if not strict and kind in ("unknown", "missing"):
        model.load_state_dict(weights, strict=False)
        return
    with pytest.raises(WeightsError, match=f"expected weights of CoAtNet, got others, .*{message}.*; try"):
        model.load_state_dict(weights, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_every_family_compares_first(name):
    """Also those whose constructors are timm's."""
    model = timm.create_model(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"adds \['one_more'\]"):
        model.load_state_dict({**{key: value + 1 for key, value in before.items()}, "one_more": torch.ones(1)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("read", FROM_FILES[1:])
@pytest.mark.parametrize("kind", [kind for kind in UNFIT if kind != "no tensor"])
def test_files_that_do_not_fit_are_refused(trained, tmp_path, kind, read):
    change, message = UNFIT[kind]
    path = save(tmp_path / "w.pth", change(trained.state_dict()))
    with pytest.raises(WeightsError, match=f"expected weights of CoAtNet, got .*{message}.*; try"):
        read(path, num_classes=10)


def test_what_means_the_same_is_loaded(model):
    """Other precisions, strides and sizes of scalars, and no counters, as torch itself takes them."""
    state = model.state_dict()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.load_state_dict({k: v.to(dtype) if v.is_floating_point() else v.int() for k, v in state.items()})
    model.load_state_dict({k: v.clone().mT if v.ndim == 2 and len({*v.shape}) == 1 else v for k, v in state.items()})
    model.load_state_dict({**state, KEY: torch.tensor([2.0]).expand(10)})
    assert model.state_dict()[KEY].tolist() == [2.0] * 10
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    model.load_state_dict({**state, **dict.fromkeys(counters, torch.tensor([7.0]))})  # as in averaged checkpoints
    assert model.state_dict()[counters[0]] == 7
    model.load_state_dict({key: value for key, value in state.items() if key not in counters})
    older = model.state_dict()  # which says in its metadata that counters belong to it
    del older[counters[0]]
    with pytest.raises(WeightsError, match=r"lacks .*num_batches_tracked"):
        model.load_state_dict(older)
    timm.create_model(NAME, num_classes=10, device="meta").load_state_dict(state, assign=True)
    model.to(torch.float8_e4m3fn).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["test_dinat", "test_biformer"])
def test_names_of_earlier_versions_load(name, tmp_path):
    """Their stems' layers were `patch_embed.proj.0` and so on, as in NAT's official files."""
    model = timm.create_model(name)
    state = model.state_dict()
    earlier = {key.replace("patch_embed.conv.", "patch_embed.proj."): value for key, value in state.items()}
    assert earlier.keys() != state.keys()
    path = save(tmp_path / "w.pth", earlier)
    again = [read(path, name) for read in FROM_FILES[1:]]
    again.append(timm.create_model(name))
    again[-1].load_state_dict(earlier)
    around = torch.nn.ModuleDict({"backbone": timm.create_model(name)})
    around.load_state_dict({f"backbone.{key}": value for key, value in earlier.items()})
    for other in (*again, around.backbone):
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    grey, first = from_pretrained_file(path, name, in_chans=1), "patch_embed.conv.0.weight"
    torch.testing.assert_close(grey.state_dict()[first], state[first].sum(1, keepdim=True))


@pytest.mark.parametrize("read", [from_checkpoint_path, from_pretrained_file])
def test_values_that_are_not_finite_are_told(trained, tmp_path, read):
    state = {key: value.clone() for key, value in trained.state_dict().items()}
    path = save(tmp_path / "w.safetensors", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(path, num_classes=10)
    state[KEY][2:4] = float("nan")
    state["head.fc.weight"][0, 0] = float("inf")
    save(path, state)
    with pytest.warns(UserWarning, match=r"expected finite weights, got NaN or infinity in .*: tensors 2, the first"):
        loaded = read(path, num_classes=10)
    assert loaded.state_dict()[KEY].isnan().tolist() == [False] * 2 + [True] * 2 + [False] * 6


@pytest.fixture
def saved(tmp_path):
    content = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int64)}
    return content, save(tmp_path / "w.pth", content)


def test_no_byte_of_an_archive_changes_unseen(saved, tmp_path):
    """torch compares no checksums: it takes 25 of these files for good ones, with other values or names."""
    content, path = saved
    whole, read = path.read_bytes(), 0
    damaged = tmp_path / "damaged.pth"
    for place in range(0, len(whole), 2):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            weights = load_weights(damaged)
        except WeightsError:
            continue
        read += 1  # a byte that nobody reads
        assert all(torch.equal(value, content[key]) for key, value in weights.items())
        assert weights.keys() == content.keys()
    assert 0 < read < len(whole) / 2


@pytest.mark.parametrize("read", FROM_FILES)
def test_damaged_archives_are_refused(saved, tmp_path, read):
    whole = saved[1].read_bytes()
    flipped = whole.replace(torch.arange(6.0).numpy().tobytes(), bytes(24))
    assert flipped != whole
    damaged = tmp_path / "damaged.pth"
    for content in (flipped, *(whole[:size] for size in (4, 100, len(whole) // 2, len(whole) - 1))):
        damaged.write_bytes(content)
        with pytest.raises(WeightsError, match=r"expected .*, got a damaged or unsafe file .*; try"):
            read(damaged)


def test_damaged_archives_in_folders_are_refused(trained, tmp_path):
    timm.models.save_for_hf(trained, tmp_path, safe_serialization=False)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 10
    file = tmp_path / "pytorch_model.bin"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(WeightsError, match=r"pytorch_model.bin, got a damaged or unsafe file .*; try"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("kind", ["compressed", "twice"])
def test_archives_that_torch_never_writes_are_refused(saved, tmp_path, kind):
    other = tmp_path / "other.pth"
    with zipfile.ZipFile(saved[1]) as source, zipfile.ZipFile(other, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in source.infolist():
            for _ in range(1 + (kind == "twice" and entry.filename.endswith("data/0"))):
                how = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
                target.writestr(entry.filename, source.read(entry), how)
    with pytest.raises(WeightsError, match=r"got a damaged or unsafe file .*(compressed|twice)"):
        load_weights(other)


def test_archives_without_checksums_and_older_files_are_read(saved, tmp_path):
    content, path = saved
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        paths = [save(path, content)]
    finally:
        torch.serialization.set_crc32_options(before)
    paths.append(save(tmp_path / "legacy.pth", content, _use_new_zipfile_serialization=False))
    for path in paths:
        assert all(torch.equal(value, content[key]) for key, value in load_weights(path).items())


CONTENTS = {
    "list": [1, 2],
    "number": 3,
    "nothing": None,
    "tensor": torch.ones(2),
    "empty": {},
    "number as model": {"model": 3},
    "list as state_dict": {"state_dict": []},
    "empty model": {"model": {}},
    "numbers as keys": {1: torch.ones(2)},
    "numbers as values": {"head.fc.bias": 3},
    "among tensors": {"model": {"head.fc.bias": torch.ones(2), "epoch": 3}},
}


@pytest.mark.parametrize("read", FROM_FILES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_no_state_dict_is_refused(tmp_path, kind, read):
    path = save(tmp_path / "w.pth", CONTENTS[kind])
    with pytest.raises(WeightsError, match=r"expected a state dict.*, got .*; try"):
        read(path)


@pytest.mark.parametrize("name", SMALL)
def test_every_familys_filter_refuses_what_is_no_state_dict(name):
    """That is what timm gives it of a file that it has downloaded."""
    model = timm.create_model(name, device="meta")
    for content in CONTENTS.values():
        with pytest.raises(WeightsError, match="expected a state dict"):
            visattn.weights.convert_weights(content, model)


@pytest.mark.parametrize("read", FROM_FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a pipe", "nothing", "long name"])
def test_only_files_are_read(tmp_path, kind, read):
    path = tmp_path / ("x" * 300 if kind == "long name" else "w.pth")
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = "/dev/zero"
    elif "pipe" in kind:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if "link" in kind else shutil.move(tmp_path / "pipe", path)
    with pytest.raises(WeightsError, match=r"expected weights at .*, got .*(pipe|device|folder|no file|name too long)"):
        read(path)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x10" + bytes(7), b"\x02" + bytes(7) + b"[]"])
def test_damaged_safetensors_are_refused(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(header)
    with pytest.raises(WeightsError, match="got a damaged or unsafe file"):
        load_weights(path)


def test_models_of_timm_are_loaded_by_timm(tmp_path):
    model = timm.create_model("test_resnet", num_classes=2)
    loaded = from_checkpoint_path(save(tmp_path / "w.pth", model.state_dict()), "test_resnet", num_classes=2)
    assert torch.equal(loaded.fc.weight, model.fc.weight)
