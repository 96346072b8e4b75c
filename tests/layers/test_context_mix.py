"""ContMix beside the official block, on small maps, and what it tells; large convolutions that become one."""

import copy
import json

import pytest
import timm
import torch

from tests.golden import fill
from tests.layers.checks import GOLDEN, randomized
from tests.tolerances import MODEL_GOLDEN, OP, relative_error
from visattn import layers
from visattn.layers.context_mix import enlarge
from visattn.layers.dilated_reparam import BRANCHES
from visattn.models.overlock import checkpoint_filter_fn
from visattn.ops import neighborhood_mix

# What the official plug-in block calls otherwise than blocks of OverLoCK's files.
PLUG_IN = {"weight_value.0": "v.conv", "weight_value.1": "v.bn", "fusion_proj": "dyconv_proj"}


def convert(weights):
    """The official block's weights as a block of the focus network has them, and from there to ours."""
    model = timm.create_model("test_overlock", device="meta")
    official = {}
    for key, value in weights.items():
        key = key.removeprefix("block.")
        for theirs, ours in PLUG_IN.items():
            key = key.replace(theirs, ours)
        official[f"sub_blocks3.0.{key}"] = value
    converted = checkpoint_filter_fn(official, model)
    return {key.removeprefix("focus.0.blocks.0."): value for key, value in converted.items()}


@torch.no_grad()
def test_block_is_the_official_one():
    golden = json.loads((GOLDEN / "op_contmix_block.json").read_text())
    block = layers.ContMixBlock(32, num_heads=4, kernel_size=7, mlp_ratio=2, layer_scale=1.0).eval()
    assert sum(p.numel() for p in block.parameters()) == golden["params"]
    block.load_state_dict(convert(fill.fill(golden["keys"])), strict=False)
    cases = [golden, *golden["other_inputs"]]
    assert len(cases) == 3
    for case in cases:
        out, head = block(fill.image(**case["input"])), torch.tensor(case["logits"])
        assert relative_error(out.flatten()[: len(head)], head) <= MODEL_GOLDEN
        assert out.norm().item() == pytest.approx(case["logits_norm"], rel=MODEL_GOLDEN)


@pytest.mark.parametrize("size", [(14, 13), (5, 9), (9, 4)], ids=str)
def test_kernels_that_are_told_are_those_that_mix(size):
    mix = randomized(layers.ContextMix(8, 4, 2, 7, 3)).double().eval()
    x, context, v = (torch.randn(2, dim, *size).double() for dim in (8, 4, 8))
    told = mix.attended(x, context, v)
    values = enlarge(v, 7).unflatten(1, (2, 2, 2)).permute(1, 0, 4, 5, 2, 3)  # [2, B, H, W, N, D]
    assert told["context"].shape == (*values.shape[1:5], 7, 7)
    parts = zip(("small", "large"), values, (3, 7), strict=True)
    mixed = [neighborhood_mix(told[name].log(), part, kernel_size=k).flatten(3) for name, part, k in parts]
    mixed = torch.nn.functional.adaptive_avg_pool2d(torch.cat(mixed, -1).permute(0, 3, 1, 2), size)
    assert relative_error(mix(x, context, v), mixed) <= OP[torch.float64]


@pytest.mark.parametrize(
    ("size", "low", "expected"),
    [((14, 13), 13, (14, 13)), ((7, 9), 13, (13, 16)), ((9, 7), 13, (16, 13)), ((1, 1), 7, (7, 7)),
     ((3, 27), 13, (13, 116)), ((11, 11), 15, (15, 15))],
    ids=str,
)  # fmt: skip
def test_small_maps_grow_by_the_official_rule(size, low, expected):
    """Which computes in floating point: of 13 / 3 * 27 = 117 it makes 116."""
    assert enlarge(torch.randn(1, 1, *size), low).shape[2:] == expected


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_one_convolution_gives_what_the_branches_give(kernel_size):
    layer = randomized(layers.DilatedReparam(3, kernel_size)).double().eval()
    for branch in layer.branches.values():
        branch.bn.running_mean.normal_()
        branch.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 23, 20).double()
    expected = layer(x)
    keys = layers.DilatedReparam(3, kernel_size, deploy=True).state_dict().keys()
    assert not keys & layer.state_dict().keys()
    for _ in range(2):
        layer.reparameterize()
        assert layer.state_dict().keys() == keys == {"conv.weight", "conv.bias"}
        assert relative_error(layer(x), expected) <= OP[torch.float64]


@torch.no_grad()
def test_one_convolution_of_half_precision_is_rounded_once():
    layer = randomized(layers.DilatedReparam(8, 7)).bfloat16()
    for branch in layer.branches.values():
        branch.bn.running_mean.normal_()
        branch.bn.running_var.uniform_(0.5, 2)
    wide = copy.deepcopy(layer).double()
    layer.reparameterize()
    wide.reparameterize()
    for got, expected in zip(layer.conv.parameters(), wide.conv.parameters(), strict=True):
        assert relative_error(got, expected.bfloat16()) <= 1e-4
