"""What the commands say of data before they begin."""

import json
import re
import sys

import numpy as np
import pytest
from mmengine.config import ConfigDict
from PIL import Image
from pycocotools import mask as mask_tools

from tests.mm.broken_sets import FAULTS, HEIGHT, WIDTH, Data
from tests.mm.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from mm_checks import check_data


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name, tmp_path):
    kind, break_it, says = FAULTS[name]
    data = Data(kind, tmp_path)
    break_it(data)
    findings, _ = check_data(data.config, "train")
    (line,) = findings.lines("error")
    assert "\n" not in line
    assert re.search(says, line), line


@pytest.mark.parametrize("kind", ["det", "seg"])
def test_a_healthy_set_is_one_line(kind, tmp_path):
    findings, summary = check_data(Data(kind, tmp_path).config, "train")
    assert not findings.faults
    assert summary == {
        "det": "data: train 4 of 4 images (4 read), 8 objects of 1 class; val 2 of 2 images (2 read), "
        "4 objects of 1 class",
        "seg": "data: train 4 images (4 read with their masks), 2 of 2 classes, 0.0 % ignored; "
        "val 2 images (2 read with their masks), 2 of 2 classes, 0.0 % ignored",
    }[kind]
