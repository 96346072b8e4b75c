"""segmentation_models_pytorch: every decoder over every family, by `tu-NAME`."""

import pytest
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.works_with.tasks import check_fall, descend

smp = pytest.importorskip("segmentation_models_pytorch")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ISOTROPIC = ("test_deit_va", "test_dinat_isotropic")
PYRAMIDS = (
    "test_agent_swin",
    "test_biformer",
    "test_coatnet_va",
    "test_cswin",
    "test_dinat",
    "test_halonet_va",
    "test_maxvit_va",
    "pvt_tiny",  # test_pvt begins at stride 2, and has a level too few for five
    "test_resnest_va",
    "test_resnet_ea",
    "test_swin_va",
    "test_transnext",
)
# Side of an image, larger for PAN with three poolings of the last map; what the decoder asks sides to be multiples of.
DECODERS = {
    "Unet": (64, 1),
    "UnetPlusPlus": (64, 32),
    "MAnet": (64, 32),
    "Linknet": (64, 32),
    "FPN": (64, 32),
    "PSPNet": (64, 8),
    "DeepLabV3": (64, 8),
    "DeepLabV3Plus": (64, 16),
    "PAN": (128, 16),
    "UPerNet": (64, 32),
    "Segformer": (64, 32),
    "DPT": (64, 32),
}


def trains(decoder, name, side):
    """Logits of an image's size, and finite gradients of all that takes part."""
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=3)
    logits = model(torch.randn(2, 3, side, side))
    logits.square().mean().backward()
    grads = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert logits.shape == (2, 3, side, side)
    assert grads
    return all(x.isfinite().all() for x in [logits, *grads])


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder(works, decoder):
    names = PYRAMIDS + ISOTROPIC * (decoder == "DPT")
    assert not [name for name in names if not trains(decoder, name, DECODERS[decoder][0])]
    works("segmentation_models_pytorch", f"{decoder}, forward and backward", f"{len(names)} models: finite")


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_dinat", "test_transnext", "pvt_tiny"])
def test_sizes(works, name):
    """Ours have no rule of sizes; most decoders do, and say so."""
    taken = 0
    for decoder, (_, multiple) in DECODERS.items():
        model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=3).eval()
        for size in ((160, 128), (161, 131)):
            image = torch.randn(1, 3, *size)
            if size[0] % multiple:
                with pytest.raises(RuntimeError, match=f"divisible by {multiple}"):
                    model(image)
            else:
                assert model(image).shape[2:] == size
                taken += 1
    measured = f"{len(DECODERS)} decoders, and 161x131 with {taken - len(DECODERS)}: logits of the same size"
    works("segmentation_models_pytorch", f"`{name}`, images of 160x128", measured)


@pytest.mark.parametrize(("name", "output_stride"), [("tu-dinat_mini", 16), ("tu-test_transnext", 8)])
def test_deeplab_trains(works, name, output_stride):
    model = smp.DeepLabV3Plus(name, encoder_weights=None, encoder_output_stride=output_stride, classes=2)
    image, target = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    target[0, 16:48, 8:40] = target[1, :, 32:] = 1
    image += target[:, None]
    assert model.encoder(image)[-1].shape[-1] == 64 // output_stride
    losses = descend(model.parameters(), lambda: F.cross_entropy(model(image), target), lr=5e-4)
    what = f"DeepLabV3+ over `{name}`, output stride {output_stride}"
    works("segmentation_models_pytorch", what, check_fall(losses, 0.6))
