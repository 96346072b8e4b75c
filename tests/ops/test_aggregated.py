"""Aggregated attention: its parts, the position bias, precision, memory."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.ops.cases import aggregated_shapes
from tests.ops.gradients import Recorder, check, kept_bytes, leaves
from tests.tolerances import relative_error
from visattn.ops import aggregated_attention, aggregated_weights, chunking
from visattn.ops.geometry import Pooled, interpolated

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64
MAPS = ("q", "pool_k", "pool_v", "k", "v")


PLAIN = (aggregated_shapes(2, (12, 9), (3, 2), 2, 24, kernel=3), {"pretrain_size": [7, 7]}, True, 0)
BASE = {"bias_size": [8, 8, 2, 2]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend, dtype):
    """Parameters stay in float32, and so do logits, forward and backward."""
    shapes, call, _, seed = PLAIN
    tensors = leaves(shapes, seed, torch.float32)
    tensors = {n: (t.to(dtype) if n in MAPS else t).requires_grad_() for n, t in tensors.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = aggregated_attention(**tensors, **call, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), list(tensors.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert [g.dtype for g in results[0][1:]] == [t.dtype for t in tensors.values()]


@pytest.mark.parametrize("chunk", [1, 1000, 3000])
@pytest.mark.parametrize("kernel", [None, 3])
def test_chunks_do_not_change_the_result(monkeypatch, chunk, kernel):
    monkeypatch.setattr(chunking, "CHUNK", chunk)
    monkeypatch.setattr(chunking, "MOST", 1000)
    _, call, _, seed = PLAIN
    shapes = aggregated_shapes(2, (12, 9), (3, 2), 2, 24, kernel=kernel)
    check(aggregated_attention, (shapes, call, kernel is not None, seed), "eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_are_zero_after_normalisation(backend):
    """As F.normalize: no NaN, and the gradient of zero is finite."""
    tensors = leaves(PLAIN[0], 0)
    for name in ("q", "k", "pool_k"):
        tensors[name][:, 0, 1] = 0
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    out = aggregated_attention(**tensors, pretrain_size=7, backend=backend)
    for t in (out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))):
        assert t.isfinite().all()


def test_trains_in_deterministic_mode():
    """Operations without a deterministic form would raise."""
    shapes, call, _, seed = PLAIN
    tensors = {n: t.requires_grad_() for n, t in leaves(shapes, seed, torch.float32).items()}
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            out = aggregated_attention(**tensors, **call, **BASE)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_pooled_keys_lie_where_pooling_puts_them():
    for length in range(1, 40):
        for pooled in range(1, length + 1):
            axis = Pooled(length, pooled)
            tokens = torch.arange(length, dtype=torch.float64)
            keys = F.adaptive_avg_pool1d(tokens[None], pooled)[0]
            assert torch.equal(torch.tensor(axis.keys) / 2, keys)
            distances = torch.tensor(list(axis.distances)) / 2
            assert torch.equal(distances[axis.index()], tokens[:, None] - keys)
            assert len(distances) <= 4 * length
    assert len(Pooled(56, 7).distances) == 104
    assert len(Pooled(7, 7).distances) == 13


@pytest.mark.parametrize("sizes", [(8, 3, 13, 5), (9, 4, 5, 2), (5, 5, 11, 11), (1, 1, 4, 2), (6, 2, 6, 3)])
def test_interpolation_is_that_of_pytorch(sizes):
    length, pooled, new_length, new_pooled = sizes
    axis = Pooled(length, pooled)
    values = torch.randn(len(axis.distances), dtype=torch.float64)
    index, weights = interpolated(axis, new_length, new_pooled)
    expected = F.interpolate(values[axis.index()][None, None], (new_length, new_pooled), mode="bilinear")[0, 0]
    assert relative_error((values[index] * weights).sum(-1), expected) <= tolerances.OP[torch.float64]
    assert interpolated(axis, length, pooled)[1] is None


def test_weights_are_those_of_the_softmax():
    shapes, call, _, seed = PLAIN
    tensors = leaves(shapes, seed)
    values = {n: tensors.pop(n) for n in ("v", "pool_v", "tokens", "token_bias")}
    local, pooled = aggregated_weights(**tensors, **call)
    assert local.shape == (2, 12, 9, 2, 9)
    assert pooled.shape == (2, 12, 9, 2, 3, 2)
    assert relative_error(local.sum(-1) + pooled.sum((-1, -2)), torch.ones(2, 12, 9, 2)) <= tolerances.OP[torch.float64]
    assert (local[:, 0, :, :, :3] == 0).all()
    out = torch.einsum("bhwnpq,bpqnd->bhwnd", pooled, values["pool_v"])
    v = F.pad(values["v"], (0, 0, 0, 0, 1, 1, 1, 1))
    for j in range(9):
        out = out + local[..., j, None] * v[:, j // 3 : j // 3 + 12, j % 3 : j % 3 + 9]
    expected = aggregated_attention(**tensors, **call, v=values["v"], pool_v=values["pool_v"])
    assert relative_error(out, expected) <= tolerances.OP[torch.float64]
    for name in ("k", "local_bias"):
        del tensors[name]
    local, pooled = aggregated_weights(**tensors, **call)
    assert local is None
    assert relative_error(pooled.sum((-1, -2)), torch.ones(2, 12, 9, 2)) <= tolerances.OP[torch.float64]


def measure(size):
    """Bytes per token: the largest tensor that forward and backward make, and what is kept between them."""
    shapes = aggregated_shapes(1, (size, size), (size // 8, size // 8), 2, 24, hidden=64, kernel=3)
    tensors = {n: t.requires_grad_() for n, t in leaves(shapes, 0, torch.float32).items()}
    with Recorder() as recorder:
        kept, out = kept_bytes(partial(aggregated_attention, pretrain_size=7), **tensors)
        torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    return np.array([recorder.largest, kept]) / size**2, recorder.names


def test_memory_is_linear_in_tokens(monkeypatch):
    """Four times the tokens see four times the pooled keys: a dense bias would need four times as much per token."""
    monkeypatch.setattr(chunking, "CHUNK", 1)
    (small, _), (large, names) = measure(64), measure(128)
    assert (large <= 1.05 * small).all()
    assert large[0] < 2 * 16**2 * 4  # of a dense bias
    assert not [n for n in names if "scatter" in n or "index_put" in n]
