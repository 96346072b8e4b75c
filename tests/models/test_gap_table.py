"""What timm 1.0.31 cannot do with its MaxViT, CoAtNet, HaloNet and ResNeSt, row by row, on our models.

What all families can, any size and other output strides and formats, is tested with the others.
"""

import pytest
import timm
import torch

import visattn  # noqa: F401
from tests.tolerances import SAME_MODEL, relative_error

NAMES = ["test_maxvit_va", "test_coatnet_va", "test_halonet_va", "test_resnest_va"]
pytestmark = pytest.mark.parametrize("name", NAMES)


def levels(size):
    return [tuple(-(-n // s) for n in size) for s in (2, 4, 8, 16, 32)]


@torch.no_grad()
@pytest.mark.parametrize("size", [(256, 192), (250, 230)], ids=str)
def test_img_size_in_the_constructor(name, size):
    """timm: TypeError (resnest), no effect and then an error (halonet), a mismatch at 250 x 230 (coatnet)."""
    model = timm.create_model(name, img_size=size).eval()
    assert model(torch.randn(1, 3, *size)).isfinite().all()


@torch.no_grad()
def test_set_input_size_keeps_the_parameters(name):
    """timm: absent (halonet, resnest), or a new nn.Parameter that optimizer, EMA and DDP do not know."""
    model = timm.create_model(name).eval()
    before = dict(model.named_parameters())
    model.set_input_size(img_size=(256, 192))
    assert all(before[n] is p for n, p in model.named_parameters())
    assert model(torch.randn(1, 3, 256, 192)).isfinite().all()
    assert model(torch.randn(1, 3, 97, 131)).isfinite().all()


@torch.no_grad()
def test_set_input_size_of_a_feature_extractor(name):
    """timm: 'FeatureListNet' object has no attribute 'set_input_size'."""
    extractor = timm.create_model(name, features_only=True).eval()
    extractor.model.set_input_size(img_size=(128, 192))
    assert [tuple(m.shape[2:]) for m in extractor(torch.randn(1, 3, 128, 192))] == levels((128, 192))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_norm_per_level(name, kind):
    """timm: raw features only."""
    model = timm.create_model(name, features_only=True, out_norm=kind, out_indices=(1, 2, 4)).train(kind == "batch")
    plain = timm.create_model(name, features_only=True, out_indices=(1, 2, 4)).train(kind == "batch")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "out_norms" not in k})
    image = torch.randn(2, 3, 64, 96)
    for got, raw in zip(model(image), plain(image), strict=True):
        dims = (1,) if kind == "layer" else (0, 2, 3)
        variance = raw.var(dims, correction=0, keepdim=True)
        expected = (raw - raw.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()
        assert relative_error(got, expected) <= 1e-3
    assert len([n for n, _ in model.named_parameters() if "out_norms" in n]) == 6
    with pytest.raises(ValueError, match="expected out_norm"):
        timm.create_model(name, out_norm="group")


@torch.no_grad()
def test_compile_with_dynamic_sizes(name):
    """timm's coatnet: the mask of SDPA has the size of the first image."""
    model = timm.create_model(name).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((96, 128), (160, 97)):
        image = torch.randn(1, 3, *size)
        assert relative_error(compiled(image), model(image)) <= SAME_MODEL


def test_checkpointing_under_compile(name):
    model = timm.create_model(name).train()
    image = torch.randn(2, 3, 96, 64)
    grads = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.compile(model, fullgraph=True, backend="aot_eager")(image).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch._dynamo.reset()
    assert relative_error(grads[1], grads[0]) <= 10 * SAME_MODEL


@torch.no_grad()
def test_attention_is_fused_in_inference(name):
    """timm's halonet: explicit products and softmax."""
    if "resnest" in name:
        pytest.skip("no self-attention")
    # wide values (halonet's r_v) have another width than queries, which the fused kernel of CPUs does not take
    model = timm.create_model(name, **({"value_ratio": 1.0} if "halonet" in name else {})).eval()
    with torch.profiler.profile() as profile:
        model(torch.randn(1, 3, 64, 64))
    called = {event.key for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" in called
    assert "aten::softmax" not in called


@torch.no_grad()
def test_other_abilities(name):
    """Where timm's models work too: grey images, no classifier, half precision, channels-last memory, meta device."""
    image = torch.randn(1, 1, 64, 96)
    model = timm.create_model(name, in_chans=1, num_classes=0).eval()
    out = model(image)
    assert out.shape == (1, model.head_hidden_size)
    assert relative_error(model.to(memory_format=torch.channels_last)(image), out) <= SAME_MODEL
    half = model.to(torch.bfloat16)(image.to(torch.bfloat16))
    assert torch.cosine_similarity(half.float(), out).min() > 0.99
    assert timm.create_model(name, device="meta").eval()(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 1000)
