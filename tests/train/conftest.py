"""`train/` is not installed: put the repository root on the path, and share one tiny data set and one way to run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for threads, which only wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder_data(tmp_path):
    """An ImageFolder of two classes: 32 training and 12 test images, non-square, separable by their colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for name, colour in (("red", (200, 60, 60)), ("blue", (60, 60, 200))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(colour, 40, (40, 48, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def run(tmp_path):
    """Call `python -m train` in this process with a small model; returns (exit code, run folder)."""
    from train.__main__ import main

    def call(name: str, *args: object, model: str = "test_vit"):
        options = () if "--resume" in args else ("--model", model, "--output", tmp_path / "out", "--run", name)
        return main([str(value) for value in (*options, *args)]), tmp_path / "out" / name

    return call
