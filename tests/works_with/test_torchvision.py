"""torchvision: feature extraction by torch.fx, and its detectors over feature maps."""

from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
from torch import nn

import visattn
from tests.tolerances import SAME_MODEL, relative_error
from tests.works_with.tasks import check_fall, descend

torchvision = pytest.importorskip("torchvision")
detection = pytest.importorskip("torchvision.models.detection")
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def keep(found, node, module, args, out):
    found[node] = out


@torch.no_grad()
def test_feature_extractor(works):
    """The outputs of modules by their names, at two image sizes; inside of blocks too, not only levels."""
    names = visattn.list_models("test_*")
    for name in names:
        model = timm.create_model(name).eval()
        # not of norms, whose output activations change in place
        modules = dict(model.named_modules())
        nodes = [node for node in get_graph_node_names(model)[1] if node in modules and "bn" not in node]
        nodes = nodes[:: len(nodes) // 3]
        found = {}
        for node in nodes:
            model.get_submodule(node).register_forward_hook(partial(keep, found, node))
        extractor = create_feature_extractor(timm.create_model(name).eval(), nodes)
        extractor.load_state_dict(model.state_dict(), strict=False)
        for size in ((64, 64), (97, 131)):
            image = torch.randn(1, 3, *size)
            model(image)
            got = extractor(image)
            assert got.keys() == found.keys()
            assert all(relative_error(got[node], found[node]) <= SAME_MODEL for node in nodes), name
    works("torchvision", "create_feature_extractor, two image sizes", f"{len(names)} models: within {SAME_MODEL:.0e}")


class Pyramid(nn.Module):
    """A backbone with an FPN, as torchvision's detectors take it."""

    out_channels = 32

    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels, LastLevelMaxPool())

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


def anchors():
    return detection.anchor_utils.AnchorGenerator(((16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 4)


def faster_rcnn(name):
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    few = {"rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 64, "min_size": 96, "max_size": 128}
    return detection.FasterRCNN(Pyramid(name), 3, rpn_anchor_generator=anchors(), box_roi_pool=pool, **few)


def retina_net(name):
    return detection.RetinaNet(Pyramid(name), 3, anchor_generator=anchors(), min_size=96, max_size=128)


@pytest.mark.parametrize("name", ["test_dinat", "test_biformer", "test_transnext"])
@pytest.mark.parametrize("build", [faster_rcnn, retina_net])
def test_detector_trains(works, build, name):
    model = build(name)
    boxes = torch.tensor([[8.0, 8.0, 56.0, 60.0], [70.0, 30.0, 120.0, 90.0]])
    image = 0.1 * torch.randn(3, 96, 128)
    image[0, 8:60, 8:56] += 1
    image[1, 30:90, 70:120] += 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    losses = descend(model.parameters(), lambda: sum(model([image, image], targets).values()))
    works("torchvision", f"{type(model).__name__} with an FPN over `{name}`", check_fall(losses, 0.6))
