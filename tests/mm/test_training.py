"""Detectors and segmentors learn real images, with a backbone of every family."""

import pytest
from mmengine.runner import Runner
from torch import nn

from tests.mm.runs import FAMILIES, losses, small_config

ITERATIONS = {"mask_rcnn": 120, "retinanet": 60, "upernet": 60, "semantic_fpn": 60}
METRICS = {
    "mask_rcnn": "coco/segm_mAP_50",
    "retinanet": "coco/bbox_mAP_50",
    "upernet": "mIoU",
    "semantic_fpn": "mIoU",
}
IN_CI = {("mask_rcnn", "nat"), ("retinanet", "biformer"), ("upernet", "agent"), ("semantic_fpn", "transnext")}
CASES = [
    pytest.param(kind, family, marks=() if (kind, family) in IN_CI else pytest.mark.slow)
    for kind in METRICS
    for family in FAMILIES
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_it_learns(kind, family, nuclei, tmp_path):
    runner = Runner.from_cfg(small_config(kind, FAMILIES[family], nuclei, tmp_path, ITERATIONS[kind]))
    for module in runner.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MaxViT's and CoAtNet's 0.01 is for longer runs
    untrained = runner.val()[METRICS[kind]]
    runner.train()
    trained = runner.val()[METRICS[kind]]
    task = "detection" if kind in ("mask_rcnn", "retinanet") else "segmentation"
    loss = losses(runner)
    first, last = sum(loss[:10]) / 10, sum(loss[-10:]) / 10
    print(f"learned {kind} {family}: loss {first:.3f} -> {last:.3f}, {METRICS[kind]} {untrained:.3f} -> {trained:.3f}")
    assert len(loss) == ITERATIONS[kind]
    assert last < 0.9 * first
    assert untrained < (0.1 if task == "detection" else 50)
    assert trained > untrained + (0.1 if task == "detection" else 25)
