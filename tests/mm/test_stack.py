"""What tools/install_mm.sh installs: the versions, and compiled ops that compute what torchvision's do."""

import subprocess

import pytest
import torch
import torchvision
from mmcv.ops import nms, roi_align

from tests.mm.conftest import ROOT


def test_versions():
    import mmcv
    import mmdet
    import mmengine
    import mmseg

    versions = [package.__version__ for package in (mmcv, mmengine, mmdet, mmseg)]
    assert versions == ["2.1.0", "0.10.7", "3.3.0", "1.2.2"]


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_torchvisions(aligned):
    rois = torch.tensor([[0, 1.0, 2.0, 14.5, 13.0], [1, 0.0, 3.3, 28.0, 19.0], [1, -3.0, -2.0, 70.0, 50.0]])
    features = torch.randn(2, 3, 20, 30, requires_grad=True)
    weight = torch.randn(3, 3, 7, 5)
    results = []
    for out in (
        roi_align(features, rois, (7, 5), 0.5, 2, "avg", aligned),
        torchvision.ops.roi_align(features, rois, (7, 5), 0.5, 2, aligned),
    ):
        results.append((out, *torch.autograd.grad((out * weight).sum(), features)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_nms_is_torchvisions():
    corner, size = torch.rand(200, 2) * 50, torch.rand(200, 2) * 30
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(200)
    kept = nms(boxes, scores, 0.4)[1]
    assert 5 < len(kept) < 200
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.4))


def test_the_script_says_what_it_needs(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(ROOT / "tools" / "install_mm.sh")]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected an active environment with torch, got none; try pip install" in done.stderr
