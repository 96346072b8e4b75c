"""Tar files and webdataset shards: equal to the folders they were made of, indexed, and refused where damaged."""

import io
import os
import shutil
import tarfile

import pytest

from tests.train.test_train_data import add, config_for, contents
from visattn.train.data import open_data
from visattn.train.errors import DataError


def to_tar(folder, nested=False):
    """Replace a folder of class folders by a tar of them, or by a tar of one tar per class."""
    with tarfile.open(f"{folder}.tar", "w") as archive:
        for group in sorted(folder.iterdir()):
            if nested:
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as class_tar:
                    for path in sorted(group.iterdir()):
                        add(class_tar, path.name, path.read_bytes())
                add(archive, f"{group.name}.tar", inner.getvalue())
            else:
                archive.add(group, f"./{group.name}")
    shutil.rmtree(folder)


def to_shards(folder, classes=("blue", "red"), shards=2):
    """Replace a folder of class folders by webdataset shards."""
    samples = [(path, number) for number, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    files = [(f"{number}-{path.stem}", path.read_bytes(), number) for path, number in samples]
    shutil.rmtree(folder)
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for key, content, number in files[shard::shards]:
                add(archive, f"{key}.json", b"{}")
                add(archive, f"{key}.cls", f"{number}\n".encode())
                add(archive, f"{key}.png", content)


@pytest.mark.parametrize("layout", ["tar", "nested tar", "shards"])
def test_tar_files_hold_what_the_folder_held(folder_data, layout):
    before = open_data(config_for(folder_data))
    expected = [contents(source, before.class_names) for source in (before.train, before.eval)]
    for split in ("train", "val"):
        if layout == "shards":
            to_shards(folder_data / split)
        else:
            to_tar(folder_data / split, nested=layout == "nested tar")
    for _ in ("listed", "from the index"):
        data = open_data(config_for(folder_data))
        assert data.class_names == (["0", "1"] if layout == "shards" else ["blue", "red"])
        assert [contents(source, before.class_names) for source in (data.train, data.eval)] == expected
        assert sorted(path.suffix for path in folder_data.glob(".*")) == [".json", ".json"]
    where = {"tar": "val.tar/blue/1.png", "nested tar": "val.tar/blue/1.png", "shards": "val/0.tar/0-2.png"}
    assert data.eval.name(1) == f"{folder_data}/{where[layout]}"


def test_index_of_shards_is_kept_and_checked(folder_data, monkeypatch):
    for split in ("train", "val"):
        to_shards(folder_data / split)
    open_data(config_for(folder_data))
    kept = folder_data / ".train.index.json"
    kept.write_text(kept.read_text().replace("0-0.png", "from-the-index.png"))
    assert open_data(config_for(folder_data)).train.name(0) == f"{folder_data}/train/0.tar/from-the-index.png"

    shard = folder_data / "train" / "0.tar"
    os.utime(shard, ns=(0, 0))  # a tar of the same size that is another one
    assert open_data(config_for(folder_data)).train.name(0) == f"{folder_data}/train/0.tar/0-0.png"

    def refuse(*args, **options):
        raise PermissionError("read-only")

    kept.unlink()
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(open_data(config_for(folder_data)).train) == 32
    assert not kept.exists()


def test_what_a_killed_process_left_of_an_index_goes_and_another_process_keeps_its_own(folder_data):
    for split in ("train", "val"):
        to_shards(folder_data / split)
    left, fresh = (folder_data / f".train.index.json{name}" for name in ("abandoned", "fresh"))
    for path in (left, fresh):
        path.write_text("{")
    os.utime(left, (0, 0))
    open_data(config_for(folder_data))
    assert not left.exists()
    assert fresh.exists()


def test_a_tar_without_class_folders_is_refused(folder_data):
    shutil.rmtree(folder_data / "val")
    with tarfile.open(folder_data / "val.tar", "w") as archive:
        add(archive, "ILSVRC2012_val_00000001.JPEG", b"")
    with pytest.raises(DataError, match=r"expected class folders in .*val.tar, got the image ILSVRC.*; try CLASS/ILS"):
        open_data(config_for(folder_data))


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"0.cls": b"red"}, r"1.tar: 0.cls: expected a class number from 0 on, got b'red'; try"),
        ({"0.cls": b"-1"}, r"got b'-1'; try"),
        ({"0.cls": b""}, r"got b''; try"),
        ({"0.png": b""}, r"1.tar: expected an image and a .cls for each key, got only one of them for 0; try"),
        ({"a/0.cls": b"0"}, r"got only one of them for a/0; try"),
        ({"0.png": b"", "0.jpg": b"", "0.cls": b"1"}, r"0.jpg: expected one image per key, got two; try"),
        ({"0.png": b"", "0.cls": b"2"}, r"hold only the 2 classes of .*/train, got also 2; try"),
    ],
)
def test_shards_with_wrong_labels(folder_data, files, error):
    for split in ("train", "val"):
        to_shards(folder_data / split, shards=1)
    with tarfile.open(folder_data / "val" / "1.tar", "w") as archive:
        for name, content in files.items():
            add(archive, name, content)
    with pytest.raises(DataError, match=error):
        open_data(config_for(folder_data))


def test_a_damaged_class_number_makes_no_giant_model(folder_data):
    to_shards(folder_data / "train", shards=1)
    with tarfile.open(folder_data / "train" / "1.tar", "w") as archive:
        add(archive, "0.png", b"")
        add(archive, "0.cls", b"123456789")
    with pytest.raises(
        DataError, match=r"expected an image of each class .*, got 33 images and class number 123456789"
    ):
        open_data(config_for(folder_data))


@pytest.mark.parametrize("damage", ["truncated", "gzip", "broken link"])
def test_damaged_tar_files_are_refused(folder_data, damage):
    to_shards(folder_data / "val")
    shard = folder_data / "val" / "1.tar"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-20000])
    else:
        shard.unlink()
    if damage == "gzip":
        tarfile.open(shard, "w:gz").close()
    if damage == "broken link":
        shard.symlink_to("nowhere.tar")
    with pytest.raises(DataError, match=r"expected an uncompressed tar file at .*/1.tar, got .*; try tar -tf"):
        open_data(config_for(folder_data))


def test_shards_without_images_are_refused(folder_data):
    shutil.rmtree(folder_data / "val")
    (folder_data / "val").mkdir()
    with tarfile.open(folder_data / "val" / "0.tar", "w") as archive:
        add(archive, "0.json", b"{}")
    with pytest.raises(DataError, match=r"expected images .* of .*/val, got none; try"):
        open_data(config_for(folder_data))
