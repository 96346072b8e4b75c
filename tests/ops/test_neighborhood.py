"""Neighborhood attention: backends against the reference and the goldens of the official kernels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tolerances
from tests.ops.gradients import Recorder, leaves
from tests.ops.test_geometry import visible_keys
from tests.tolerances import relative_error
from visattn.ops import neighborhood_attention
from visattn.ops.geometry import Axis

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_na*.npz"))
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(path, backend, poisoned_empty):
    data = np.load(path)
    names = ["q", "k", "v"] + (["rpb"] if "rpb" in data.files else [])
    tensors = {n: torch.from_numpy(data[n]).double().requires_grad_() for n in names}
    window = [data[n].tolist() for n in ("kernel_size", "dilation", "stride", "is_causal")]
    args = (tensors["q"], tensors["k"], tensors["v"], *window, tensors.get("rpb"))
    out = neighborhood_attention(*args, scale=float(data["scale"]), backend=backend)
    out.backward(torch.from_numpy(data["grad_out"]).double())
    assert relative_error(out, torch.from_numpy(data["out"])) <= tolerances.OP_GOLDEN_FORWARD
    for name, tensor in tensors.items():
        expected = torch.from_numpy(data[f"grad_{name}"])
        assert relative_error(tensor.grad, expected) <= tolerances.OP_GOLDEN_GRADIENT, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_values_come_back(backend):
    q, k = torch.randn(2, 1, 11, 13, 2, 4)
    out = neighborhood_attention(q, k, torch.ones_like(q), (3, 5), (2, 1), backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_one_query_attends_to_one_key_when_kernel_is_one():
    q, k, v = torch.randn(3, 1, 4, 5, 1, 3)
    torch.testing.assert_close(neighborhood_attention(q, k, v, 1), v)


def test_eager_makes_no_gathered_copy_of_all_neighborhoods():
    """The largest tensor grows with the tile, not with kernel_size ** 2 copies of the keys."""
    q, k, v = torch.randn(3, 1, 56, 56, 2, 32)
    with torch.no_grad(), Recorder() as recorder:
        neighborhood_attention(q, k, v, 7)
    assert recorder.largest <= 4 * k.numel() * k.element_size()  # gathering would take 49 times


@pytest.mark.parametrize("trains", [False, True])
def test_fused_attention_unless_the_bias_trains(trains):
    """A mask that requires a gradient makes SDPA four times slower on a CPU, even where no gradient is taken."""
    q, k, v = torch.randn(3, 1, 14, 14, 2, 32)
    bias = torch.nn.Parameter(torch.randn(2, 13, 13))
    with torch.set_grad_enabled(trains), Recorder() as recorder:
        neighborhood_attention(q, k, v, 7, bias=bias)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in recorder.names) == (not trains)
    assert not {n for n in recorder.names if "math" in n}
    assert ("_softmax" in recorder.names) == trains


MASKED = [  # size, kernel_size, dilation, stride, is_causal
    ((17,), (5,), (2,), (2,), (False,)),
    ((16,), (5,), (2,), (1,), (True,)),
    ((9, 8), (3, 4), (2, 1), (2, 3), (False, True)),
    ((7, 6), (7, 6), (1, 1), (1, 1), (False, False)),
    ((3, 5, 7), (2, 3, 3), (1, 1, 2), (1, 3, 1), (False,) * 3),
]


def hidden_keys(*shape):
    """A key_mask: half of the keys of the first image; none of the second but its last."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[1] = False
    mask[1].view(-1)[-1] = True
    return mask


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize(("size", "kernel", "dilation", "stride", "causal"), MASKED, ids=str)
def test_key_mask_is_that_of_scaled_dot_product_attention(size, kernel, dilation, stride, causal, backend, device):
    """Over pairs that the definition of windows makes one by one; queries without a key give zeros."""
    axes = [Axis(*axis) for axis in zip(size, kernel, dilation, stride, causal, strict=True)]
    tokens = int(np.prod(size))
    places = [np.unravel_index(i, size) for i in range(tokens)]
    seen = [[set(visible_keys(i, axis)) for i in range(axis.length)] for axis in axes]
    window = torch.tensor([[all(b in s[a] for s, a, b in zip(seen, i, j)) for j in places] for i in places])  # noqa: B905
    mask = hidden_keys(2, *size)
    visible = (window & mask.flatten(1)[:, None]).to(device)  # [B, S, S]
    blind = ~visible.any(-1, keepdim=True)  # [B, S, 1]
    assert blind[1].any() == (kernel != size)

    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v, do = leaves(dict.fromkeys(("q", "k", "v", "do"), (2, *size, 2, 4)), 0).values()
    found = []
    for run in ("sdpa", backend):
        given = [x.to(device, torch.float64 if run == "sdpa" else dtype).requires_grad_() for x in (q, k, v)]
        if run == "sdpa":
            flat = (x.flatten(1, -3).transpose(1, 2) for x in given)
            attend = torch.nn.functional.scaled_dot_product_attention
            out = attend(*flat, attn_mask=(visible | blind)[:, None]).masked_fill(blind[:, None], 0)
            out = out.transpose(1, 2).reshape(q.shape)
        else:
            out = neighborhood_attention(
                *given, kernel, dilation, stride, causal, key_mask=mask.to(device), backend=run
            )
        found.append([out, *torch.autograd.grad(out, given, do.to(out))])
    for expected, got in zip(*found, strict=True):
        assert relative_error(got, expected) <= tolerances.OP[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_what_is_hidden_makes_no_difference(backend, extra, bias, device):
    """Hidden keys and values may hold NaN, and the gradient of a blind query's log-sum-exp may be NaN."""
    mask, shapes = hidden_keys(2, 9, 8).to(device), dict.fromkeys("qkv", (2, 9, 8, 2, 4))
    shapes |= {"bias": (2, 5, 5)} if bias else {}
    shapes |= dict.fromkeys(("extra_k", "extra_v"), (2, extra, 2, 4)) if extra else {}
    clean = {n: t.to(device) for n, t in leaves(shapes, 0, torch.float32).items()}
    hurt = {n: t.masked_fill(~mask[..., None, None], torch.nan) if n in "kv" else t for n, t in clean.items()}
    do, dlse = torch.randn_like(clean["q"]), torch.randn_like(clean["q"][..., 0])
    found = []
    for tensors in (clean, hurt):
        inputs = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        out, lse = neighborhood_attention(**inputs, kernel_size=3, key_mask=mask, return_lse=True, backend=backend)
        blind = lse == -torch.inf
        given = dlse.masked_fill(blind, torch.nan) if tensors is hurt else dlse
        with torch.autograd.set_detect_anomaly(tensors is clean):  # which finds NaN on the way
            grads = torch.autograd.grad([out, lse], list(inputs.values()), [do, given])
        found.append({"out": out, "lse": lse, **dict(zip(inputs, grads, strict=True))})
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name  # which NaN is not, either
    assert blind.any() == (extra == 0)
    assert not found[0]["out"][blind].any()
    assert not found[0]["q"][blind].any()
    for name in "kv":
        assert not found[0][name][~mask].any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_vmap_over_masks(backend, device):
    q, k, v = torch.randn(3, 2, 6, 5, 2, 4, device=device)
    masks = torch.stack([hidden_keys(2, 6, 5), torch.ones(2, 6, 5, dtype=torch.bool)]).to(device)

    def gradient(mask):
        def loss(q):
            return neighborhood_attention(q, k, v, 3, key_mask=mask, backend=backend).square().sum()

        return torch.func.grad(loss)(q)

    for found, mask in zip(torch.func.vmap(gradient)(masks), masks, strict=True):
        torch.testing.assert_close(found, gradient(mask))
