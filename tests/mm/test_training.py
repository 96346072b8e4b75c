"""Detectors and segmentors learn real images, with a backbone of every family."""

import pytest
from mmengine.runner import Runner

from tests.mm.runs import FAMILIES, losses, small_config

METRICS = {
    "mask_rcnn": "coco/segm_mAP_50",
    "retinanet": "coco/bbox_mAP_50",
    "upernet": "mIoU",
    "semantic_fpn": "mIoU",
}
IN_CI = {("mask_rcnn", "biformer"), ("retinanet", "nat"), ("upernet", "agent"), ("semantic_fpn", "transnext")}
CASES = [
    pytest.param(kind, family, marks=() if (kind, family) in IN_CI else pytest.mark.slow)
    for kind in METRICS
    for family in FAMILIES
]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_it_learns(kind, family, nuclei, tmp_path, record_property):
    runner = Runner.from_cfg(small_config(kind, FAMILIES[family], nuclei, tmp_path, iterations=60))
    untrained = runner.val()[METRICS[kind]]
    runner.train()
    trained = runner.val()[METRICS[kind]]
    loss = losses(runner)
    first, last = sum(loss[:10]) / 10, sum(loss[-10:]) / 10
    record_property("numbers", (first, last, untrained, trained))
    print(f"learned {kind} {family}: loss {first:.3f} -> {last:.3f}, {METRICS[kind]} {untrained:.3f} -> {trained:.3f}")
    assert len(loss) == 60
    assert last < 0.8 * first
    if kind in ("mask_rcnn", "retinanet"):
        assert untrained < 0.02
        assert trained > 0.15
    else:
        assert trained > untrained + 15
