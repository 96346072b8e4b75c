"""Data as people have it: what is used, what is left out, and that both are said before training."""

import io
import json
import os
import re
import shutil
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.test_train_data import add, config_for, contents
from visattn.train.data import open_data, open_eval
from visattn.train.errors import DataError
from visattn.train.files import open_regular
from visattn.train.listing import list_folder, natural
from visattn.train.metrics import make_console, say
from visattn.train.tars import list_tars

MANUAL = Path(__file__).resolve().parents[2] / "train" / "README.md"


def write(path, content=None):
    """An image of its own, in the format that its name says, or other content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        seed = [ord(letter) for letter in path.name]
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, Image.registered_extensions()[path.suffix.lower()])
    else:
        path.write_bytes(content)
    return path


def tree(root, *names):
    """Images at these paths; a name that ends in / is an empty folder."""
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            write(root / name)
    return root


PAIR = ("train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "val/dog/1.png")


def targets(source):
    """{path below the split: class number}"""
    names = [source.name(index) for index in range(len(source))]
    paths = [re.split(r"/(?:train|val)(?:\.tar)?/", name, maxsplit=1)[1] for name in names]
    return dict(zip(paths, source.targets.tolist(), strict=True))


def test_the_report_is_that_of_the_manual(tmp_path):
    root = tree(
        tmp_path,
        *(f"train/cat/{part}/{index}.png" for part in ("day", "night") for index in range(6)),
        *(f"train/dog/{index}.png" for index in range(23)),
        *(f"train/dog/{name}" for name in ("a.TIF", "b.bmp", "c.gif", "d.webp", "@eaDir/0.png", "._0.png")),
        *("train/empty/", "validation/cat/0.png", "validation/dog/0.png"),
    )
    dog = root / "train" / "dog"
    for name in ("a.txt", "b.txt", "c.TXT", "scan.heic"):
        write(dog / name, b"")
    os.mkfifo(dog / "pipe.png")
    os.mknod(dog / "socket.png", stat.S_IFSOCK | 0o600)
    (dog / "gone.png").symlink_to("nowhere.png")
    (dog / "loop").symlink_to("../../train")
    (root / "train" / "kitten").symlink_to("cat")
    data = open_data(config_for(root))
    assert data.class_names == ["cat", "dog"]
    text = "\n".join([data.train.report, data.eval.report]).replace(str(root), "DIR")
    assert f"```\n{text}\n```" in MANUAL.read_text()


def test_clean_data_has_no_report(folder_data):
    data = open_data(config_for(folder_data))
    assert (data.train.report, data.eval.report) == ("", "")


def test_the_class_is_the_first_folder(tmp_path):
    names = [f"{split}/{pet}/{part}/0.png" for split in ("train", "val") for pet in ("cat", "dog") for part in "ab"]
    data = open_data(config_for(tree(tmp_path, *names)))
    assert data.class_names == ["cat", "dog"]
    expected = {"cat/a/0.png": 0, "cat/b/0.png": 0, "dog/a/0.png": 1, "dog/b/0.png": 1}
    assert targets(data.train) == targets(data.eval) == expected
    assert data.train.report.endswith("/train: 4 images of 2 classes; 4 deeper than CLASS/IMAGE")


@pytest.mark.parametrize(
    ("links", "left_out", "count"),
    [
        ({"cat/loop": ".."}, "1 link loop (cat/loop)", 2),
        ({"cat/loop": "../.."}, "1 link loop (cat/loop)", 2),  # would bring in val
        ({"cat/loop": "."}, "1 link loop (cat/loop)", 2),
        ({"loop": "."}, "1 link loop (loop)", 2),
        ({"cat/loop": "loop"}, "1 broken link (cat/loop)", 2),
        ({"cat/one": "two", "cat/two": "one"}, "2 broken links (cat/one, cat/two)", 2),
        ({"cat/pool": "../../pool", "dog/pool": "../../pool"}, "1 repeated folder (dog/pool = cat/pool)", 3),
        ({"cat/other": "../dog", "dog/other": "../cat"}, "2 repeated folders (cat/other = dog, dog/other = cat)", 2),
        ({"kitten": "cat", "puppy": "dog"}, "2 repeated folders (kitten = cat, puppy = dog)", 2),
        ({"a": "../pool", "b": "../pool"}, "1 repeated folder (b = a)", 3),
        ({"cat/pool": "../../pool/back", "dog/pool": "../../pool"}, "1 link loop (cat/pool/x)", 3),
    ],
)
def test_each_real_folder_counts_once(tmp_path, links, left_out, count):
    tree(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "pool/2.png")
    if "back" in str(links):
        (tmp_path / "pool" / "back").mkdir()
        (tmp_path / "pool" / "back" / "x").symlink_to("../../train/cat")
    for name, target in links.items():
        (tmp_path / "train" / name).symlink_to(target)
    listing = list_folder(tmp_path / "train")
    assert len(listing.names) == count
    assert f"left out: {left_out}" in listing.report


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    tree(tmp_path, "pool/cat/0.png", "pool/dog/a/0.png", "val/cat/1.png", "val/dog/1.png", "train/")
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).symlink_to(f"../pool/{name}")
    (tmp_path / "train" / "cat" / "one.png").symlink_to("0.png")
    data = open_data(config_for(tmp_path))
    assert targets(data.train) == {"cat/0.png": 0, "cat/one.png": 0, "dog/a/0.png": 1}
    assert not open_data(config_for(tmp_path)).eval.report


def test_test_images_that_are_training_images_are_said(tmp_path):
    tree(tmp_path, "train/cat/0.png", "train/dog/0.png")
    (tmp_path / "val").symlink_to("train")
    assert "; 3 folder(s) of " in open_data(config_for(tmp_path)).eval.report


@pytest.mark.parametrize("place", ["train", "val"])
@pytest.mark.parametrize("how", ["folder", "text", "link", "tar", "shards"])
def test_the_split_that_lacks_a_class_is_blamed(tmp_path, place, how):
    tree(tmp_path, *PAIR, "train/cat/2.png", "train/owl/0.png", "val/owl/1.png")
    owl = next((tmp_path / place / "owl").iterdir())
    owl.unlink()
    if how == "text":
        write(owl.with_suffix(".txt"), b"")
    if how == "link":
        owl.parent.rmdir()
        owl.parent.symlink_to("nowhere")
    for split in ("train", "val") if how in ("tar", "shards") else ():
        old = (tmp_path / split).rename(tmp_path / f"old {split}")
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            if how == "tar":
                archive.add(old, ".")
            for number, name in enumerate(("cat", "owl", "dog")) if how == "shards" else ():
                for path in (old / name).iterdir():
                    add(archive, f"{name}{path.stem}.png", path.read_bytes())
                    add(archive, f"{name}{path.stem}.cls", str(number).encode())
        if how == "shards":
            (tmp_path / split).mkdir()
            (tmp_path / f"{split}.tar").rename(tmp_path / split / "0.tar")
    where = "1" if how == "shards" else "owl"
    with pytest.raises(
        DataError, match=rf"expected images of all .*classes in \S*/{place}(.tar)?, got none of {where}; try"
    ):
        open_data(config_for(tmp_path))
    if how != "shards" and place == "val":
        with pytest.raises(
            DataError, match=rf"expected images in each class folder of \S*/val\S*, got none in {where}; try"
        ):
            open_eval(config_for(tmp_path))


def test_one_class_of_two_is_empty(tmp_path):
    tree(tmp_path, "train/cat/0.png", "train/dog/", *PAIR[2:])
    with pytest.raises(DataError, match=r"at least 2 classes in \S*/train, got 1; try .*without images: dog"):
        open_data(config_for(tmp_path))


def test_names_that_differ_in_case_or_by_zeros_have_one_order(tmp_path):
    names = ["01", "1", "Cat", "cat", "caf\u00e9", "cafe\u0301", "2", "10", "1²3"]
    tree(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val") for name in names))
    data = open_data(config_for(tmp_path))
    assert data.class_names == ["01", "1", "1²3", "2", "10", "cafe\u0301", "caf\u00e9", "Cat", "cat"]
    assert data.train.report.endswith("; classes of nearly one name: cafe\u0301 and caf\u00e9, Cat and cat")
    assert natural("9" * 5000) < natural("1" + "0" * 5000) < natural("a")


@pytest.mark.parametrize(
    "there",
    [("val", "valid", "validation", "test"), ("valid", "validation", "test"), ("validation", "test"), ("test",)],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_of_the_test_split(tmp_path, there, kind):
    tree(tmp_path, "train/cat/0.png", "train/dog/0.png")
    for index, name in enumerate(there):
        tree(tmp_path, *(f"{name}/{pet}/{image}.png" for pet in ("cat", "dog") for image in range(index + 1)))
        if kind == "tar":
            with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                archive.add(tmp_path / name, name)
            (tmp_path / name).rename(tmp_path / f"old {name}")
    source = open_data(config_for(tmp_path)).eval
    assert len(source) == 2
    assert ("used as there is no val" in source.report) == (there[0] != "val")
    assert f"/{there[0]}" in source.name(0)
    assert open_eval(config_for(tmp_path))[0].report == source.report


@pytest.mark.parametrize("name", ["val", "val.tar", "train"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_split_that_is_neither_folder_nor_tar_is_refused(tmp_path, name, make):
    tree(tmp_path, *(path.replace("val/", "test/") for path in PAIR))
    if name == "train":
        (tmp_path / "train").rename(tmp_path / "old")
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"expected a folder of class folders or a tar file, got .*/{name}, which is"):
        open_data(config_for(tmp_path))


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./train/", "data/train/", "/train/", "../train/"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_class_in_a_tar_is_the_first_folder(tmp_path, prefix, nested):
    images = [f"{pet}/{part}0.png" for pet in ("cat", "dog") for part in (("a/", "b/") if nested else ("",))]
    tree(tmp_path, *(f"val/{image}" for image in images))
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for image in images:
            add(archive, f"{prefix}{image}", (tmp_path / "val" / image).read_bytes())
    data = open_data(config_for(tmp_path))
    assert data.class_names == ["cat", "dog"]
    assert contents(data.train) == contents(data.eval)
    assert ("classes are the folders below" in data.train.report) == (len(prefix) > 2)
    assert ("4 deeper than CLASS/IMAGE" in data.train.report) == nested


def test_class_tars_may_hold_folders(tmp_path):
    tree(tmp_path, *PAIR)
    image = (tmp_path / PAIR[0]).read_bytes()
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for pet in ("cat", "dog"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as class_tar:
                for name in ("./0.png", "day/0.png", f"{pet}/0.png", "._0.png", "list.txt"):
                    add(class_tar, name, image)
            add(archive, f"./._{pet}.tar", b"of macOS")
            add(archive, f"./{pet}.tar", inner.getvalue())
    (tmp_path / "val").rename(tmp_path / "old")
    source = open_data(config_for(tmp_path)).eval
    assert set(targets(source)) == {f"{pet}/{name}0.png" for pet in ("cat", "dog") for name in ("", "day/", f"{pet}/")}
    assert "left out: 4 hidden files (._cat.tar, ._dog.tar, cat/._0.png, ...), 2 *.txt" in source.report
    assert source.read(0)[0].size == (8, 8)


def test_members_that_are_no_files_are_named(tmp_path):
    tree(tmp_path, *PAIR)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "train", ".")
        add(archive, "cat/0.png", (tmp_path / "val/cat/1.png").read_bytes())
        add(archive, "cat/soft.png", type=tarfile.SYMTYPE, linkname="0.png")
        add(archive, "cat/hard.png", type=tarfile.LNKTYPE, linkname="cat/0.png")
        add(archive, "cat/pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "cat/device.png", type=tarfile.CHRTYPE)
        add(archive, "__MACOSX/cat/._0.png", b"")
        add(archive, "cat/a.eps", b"")
    (tmp_path / "train").rename(tmp_path / "old")
    for _ in ("listed", "from the index"):
        data = open_data(config_for(tmp_path))
        assert targets(data.train) == {"cat/0.png": 0, "dog/0.png": 1}
        assert data.train.report.endswith(
            "left out: 2 links (cat/hard.png, cat/soft.png), 2 special files (cat/device.png, cat/pipe.png), "
            "1 earlier member of the same name (cat/0.png), 1 hidden file (__MACOSX/cat/._0.png), 1 *.eps"
        )
        assert contents(data.train)[0] == contents(data.eval)[0]


def pointing_back(content):
    content[124:136] = (2**96 - 1024).to_bytes(12, "big")  # a negative size
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()


def test_what_would_end_a_tar_before_its_end_is_refused(tmp_path):
    tar, damages = tmp_path / "train.tar", {"pointing back": pointing_back}
    damages["header"] = lambda content: content.__setitem__(1024, 1)  # that of the second image
    damages["more after the end"] = lambda content: content.extend(content)
    damages["half a header"] = lambda content: content.__delitem__(slice(1200, None))
    for damage in damages.values():
        with tarfile.open(tar, "w") as archive:
            for name in ("cat/0.png", "dog/0.png"):
                add(archive, name, b"x" * 500)
        content = bytearray(tar.read_bytes())
        damage(content)
        tar.write_bytes(content)
        with pytest.raises(DataError, match=r"expected an uncompressed tar file at .*/train.tar, got .*; try tar -tf"):
            list_tars(tar, [tar], numbered=False)
    tar.write_bytes(content[:1024])
    assert "left out: 1 tar file without an end, maybe cut off (train.tar)" in list_tars(tar, [tar], False).report


def test_what_lies_beside_shards_is_said(tmp_path):
    tree(tmp_path, *PAIR, "train/._0.tar/")
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
        for number, pet in enumerate(("cat", "dog")):
            add(archive, f"{pet}.png", (tmp_path / "train" / pet / "0.png").read_bytes())
            add(archive, f"{pet}.cls", str(number).encode())
            add(archive, f"{pet}.json", b"{}")
    (tmp_path / "train.tar").write_bytes(b"")
    (tmp_path / "val").rename(tmp_path / "old")
    (tmp_path / "val").symlink_to("train")
    data = open_data(config_for(tmp_path))
    assert len(data.train) == 2
    assert data.train.report.endswith(
        "left out: 2 *.json; left out beside the shards: cat, dog; train.tar beside it is left out"
    )
    assert data.eval.report.endswith(
        "; 1 tar file(s) of " + f"{tmp_path}/train too, so that models are tested on what they learnt"
    )


def test_repeated_shards_and_numbers_without_images_are_said(tmp_path):
    """As classes from 1 on have, which are common."""
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
        for key, number in enumerate("122"):
            add(archive, f"{key}.png", b"x")
            add(archive, f"{key}.cls", number.encode())
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    (tmp_path / "train" / "1.tar").symlink_to("0.tar")
    data = open_data(config_for(tmp_path))
    assert len(data.train) == 3
    assert data.train.report.endswith("2 classes; left out as repeated: 1.tar = 0.tar; without images: 0")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("place", ["shard", "tar", "index"])
def test_special_files_are_not_opened(tmp_path, make, place):
    tree(tmp_path, *PAIR)
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "train", ".")
    tar = tmp_path / "train.tar"
    if place == "index":
        make(tmp_path / ".train.tar.index.json")
        assert len(list_tars(tar, [tar], numbered=False).names) == 2
        return
    tar.unlink()
    make(tar)
    with pytest.raises(DataError, match=r"expected an uncompressed tar file at .*, got .*(egular file|Is a directory)"):
        list_tars(tmp_path / "train", [tar], numbered=place == "shard")


def test_a_file_that_turns_into_a_fifo_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "file", b"")
    regular = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(OSError, match="Not a regular file"):
        open_regular(tmp_path / "pipe")


def damaged_indexes():
    """Changes to a good index that must make it count for nothing."""
    for key in ("names", "labels", "places", "empty", "remarks", "stamps"):
        for value in (None, 7, "x", {}, [None], [7], [["x"]], [True]):
            yield f"{key}={value}", {key: value}
    for place in ([0, 0], [0, 0, 0, 0], [0.5, 0, 9], [1, 0, 9], [-1, 0, 9], [0, -1, 9], [0, 0, -1], [0, 0, 1 << 62]):
        yield f"place={place}", {"places": [place, place]}
    for place in ([0, 1 << 62, 1], [1 << 70, 0, 9], ["0", "0", "9"], [0, None, 9], [[0], [0], [9]], "009"):
        yield f"place={place}", {"places": [place, place]}
    for label in ("", "red", "-1", "1.5", "\u0661", "01", "9" * 5000, "123456"):
        yield f"label={label[:9]}", {"labels": [label, label]}
    for name in ("\ud800", "x" * 5000):
        yield f"name={name[:1]!a}", {"names": [name, name]}
    yield "one name", {"names": ["x"]}
    yield "another key", {"more": 1}


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"stamps": 1}'])
def test_an_index_that_is_none_counts_for_nothing(tmp_path, content):
    _check_index_is_ignored(tmp_path, lambda good: content)


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in damaged_indexes()])
def test_a_damaged_index_counts_for_nothing(tmp_path, change):
    _check_index_is_ignored(tmp_path, lambda good: json.dumps({**good, **change}).encode())


def _check_index_is_ignored(folder, damage):
    tar, index = folder / "0.tar", folder / ".train.index.json"
    with tarfile.open(tar, "w") as archive:
        for key in "01":
            add(archive, f"{key}.png", b"x")
            add(archive, f"{key}.cls", key.encode())
    good = list_tars(folder / "train", [tar], numbered=True)
    kept = index.read_bytes()
    index.write_bytes(damage(json.loads(kept)))
    assert list_tars(folder / "train", [tar], numbered=True) == good
    good.source(["0", "1"], "RGB")
    assert index.read_bytes() == kept


ODD = "a\nb\x1b[31m\r\u202e\x85\udcff[red]"
SAID = r"a\nb\x1b[31m\r\u202e\x85\udcff[red]"


def test_names_are_printed_as_text(tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    tree(tmp_path, *PAIR)
    path = write(tmp_path / "train" / "cat" / f"{ODD}.png", b"")
    (tmp_path / "train" / ODD).symlink_to("cat")
    data = open_data(config_for(tmp_path))
    say(make_console(file), data.train.report)
    say(make_console(file), f"unreadable image: {data.train.describe(1)}")
    file.seek(0)
    lines = file.read().splitlines()
    assert lines[0].endswith(
        f"/train: 3 images of 2 classes; without images: {SAID}; left out: 1 repeated folder ({SAID} = cat)"
    )
    assert lines[1] == f"unreadable image: {tmp_path}/train/cat/{SAID}.png (no image in a known format)"
    path.rename(tmp_path / "train" / f"{ODD}.png")
    with pytest.raises(DataError) as caught:
        open_data(config_for(tmp_path))
    assert str(caught.value).isprintable()
    assert f"got images there ({SAID}.png)" in str(caught.value)


def test_what_the_terminal_lacks_is_spelled_out():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say(make_console(file), "caf\u00e9")
    file.seek(0)
    assert file.read() == "caf\\xe9\n"


def test_both_commands_say_it(folder_data, run, capsys):
    from visattn.train.validate import main

    write(folder_data / "val" / "red" / "notes.txt", b"")
    options = ("--img-size", 32, "--batch-size", 32, "--warmup-epochs", 0, "--epochs", 1, "--data", folder_data)
    code, folder = run("r", *options)
    assert code == 0
    said = f"{folder_data}/val: 12 images of 2 classes; left out: 1 *.txt\n"
    assert capsys.readouterr().out.index(said) < 1000
    assert main(["--run", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(said)
    # Figures that took long are shown before the file of --results is written, and a pipe is no such file.
    os.mkfifo(folder / "pipe")
    assert main(["--run", str(folder), "--results", str(folder / "pipe")]) == 2
    said = capsys.readouterr()
    assert "top1" in said.out
    assert "--results: expected a file to write to, got: [Errno 22] Not a regular" in said.err
    assert stat.S_ISFIFO(os.stat(folder / "pipe").st_mode)
    # No image to test with is no accuracy of 0.
    for path in (folder_data / "val").glob("*/*.png"):
        path.write_bytes(b"")
    code, folder = run("none", *options)
    assert code == 2
    reason = f"{folder_data}/val/blue/0.png (no image in a known format)"
    assert f"error: expected readable test images, got none, as {reason}; try to repair" in capsys.readouterr().err
    assert not (folder / "model.safetensors").exists()
