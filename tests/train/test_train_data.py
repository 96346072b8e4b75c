"""Data sets: the digits inside scikit-learn, class folders, and the errors for folders that are neither."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image

from train.config import Config
from train.data import Digits, make_loaders, open_data, resolve
from train.errors import DataError, DataNotFoundError

CPU = torch.device("cpu")
RGB = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear"}


def config_for(folder, **options):
    return resolve(dataclasses.replace(Config(), data=str(folder), batch_size=8, **options), RGB)


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, test = Digits("train", 8, "L"), Digits("test", 8, "L")
    assert (len(train), len(test)) == (1437, 360)
    counts = torch.bincount(torch.as_tensor(test.targets))
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert [image.tobytes() for image in test.images] == [image.tobytes() for image in Digits("test", 8, "L").images]
    shared = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not shared


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_batches_are_normalized(channels):
    config = resolve(dataclasses.replace(Config(), in_chans=channels), RGB)
    _, loader = make_loaders(config, open_data(config), CPU)
    images = torch.cat([images for images, _ in loader])
    assert images.shape == (360, channels, config.img_size, config.img_size)
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1


def test_digits_are_not_flipped():
    assert resolve(Config(), RGB).hflip == 0
    assert resolve(dataclasses.replace(Config(), data="x"), RGB).hflip == 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_takes_its_input_from_the_model(folder_data, channels):
    config = config_for(folder_data, in_chans=channels)
    assert (config.img_size, config.interpolation) == (32, "bilinear")
    assert config.mean == ((0.5,) if channels == 1 else (0.4, 0.5, 0.6))
    data = open_data(config)
    assert (data.num_classes, len(data.train), len(data.eval)) == (2, 32, 12)
    images, target = next(iter(make_loaders(config, data, CPU)[0]))
    assert images.shape == (8, channels, 32, 32)
    assert set(target.tolist()) <= {0, 1}


def test_every_augmentation_runs_on_grey_images(folder_data):
    config = config_for(
        folder_data, in_chans=1, auto_augment="rand-m9-mstd0.5-inc1", reprob=1.0, mixup=0.8, cutmix=1.0, hflip=1.0
    )
    images, target = next(iter(make_loaders(config, open_data(config), CPU)[0]))
    assert torch.isfinite(images).all()
    assert target.shape == (8, 2)
    torch.testing.assert_close(target.sum(1), torch.ones(8))


def test_a_class_without_test_images_keeps_the_numbering(folder_data):
    shutil.rmtree(folder_data / "val" / "blue")
    data = open_data(config_for(folder_data))
    assert {target for _, target in data.eval} == {data.train.reader.class_to_idx["red"]} == {1}


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_test_split(folder_data, name):
    (folder_data / "val").rename(folder_data / name)
    assert len(open_data(config_for(folder_data)).eval) == 12


def test_missing_folder_says_what_is_expected_and_got(tmp_path, run, capsys):
    code, _ = run("r", "--data", tmp_path / "nowhere")
    error = capsys.readouterr().err
    assert code == 2
    assert f"expected the folder {tmp_path}/nowhere/train, got no folder {tmp_path}/nowhere; try --data DIR" in error
    assert "Traceback" not in error


def test_folder_without_splits_is_refused(folder_data):
    shutil.rmtree(folder_data / "val")
    with pytest.raises(DataNotFoundError, match=r"expected the folder .*val or .*validation or .*test, got train; try"):
        open_data(config_for(folder_data))


def test_folders_that_are_no_data_set_are_refused(folder_data):
    extra = folder_data / "val" / "green"
    extra.mkdir()
    Image.new("RGB", (8, 8)).save(extra / "0.png")
    with pytest.raises(DataError, match=r"got also green; try"):
        open_data(config_for(folder_data))
    shutil.rmtree(folder_data / "train" / "blue")
    shutil.rmtree(folder_data / "val")
    shutil.copytree(folder_data / "train", folder_data / "val")
    with pytest.raises(DataError, match=r"expected at least 2 class folders in .*, got 1; try"):
        open_data(config_for(folder_data))
    for image in (folder_data / "train" / "red").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"expected class folders with images, got: Found 0 images"):
        open_data(config_for(folder_data))
