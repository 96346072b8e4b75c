"""Aggregated attention as a registered op: `torch.ops.visattn.aggregated_attention`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops._legacy import Backend, Dispatcher, always, automatic, define_op
from visattn.ops.aggregated.eager import aggregated_eager
from visattn.ops.aggregated.reference import aggregated_reference, reference_weights
from visattn.ops.aggregated.triton import aggregated_triton, refusal
from visattn.ops.checks import check_dtypes
from visattn.ops.geometry import Pooled

dispatcher = Dispatcher(
    "aggregated_attention",
    (
        Backend("triton", refusal, aggregated_triton, automatic),
        Backend("eager", always, aggregated_eager),
        Backend("reference", always, aggregated_reference),
    ),
)


def _bias_axes(size: Sequence[int], bias_size: Sequence[int]) -> tuple[Pooled, Pooled]:
    """The axes that the position bias is evaluated on, for a map of `size` [H, W, PH, PW]."""
    if len(bias_size) not in (0, 4):
        raise ValueError(f"expected bias_size of no or 4 ints (H, W, PH, PW), got {list(bias_size)}")
    for h, w, ph, pw in (size, bias_size or size):
        if not (1 <= ph <= h and 1 <= pw <= w):
            raise ValueError(
                f"expected a map with at least one and at most as many pooled keys as tokens per axis, got "
                f"{(ph, pw)} pooled keys for a map of {(h, w)}; try a larger image"
            )
    h, w, ph, pw = bias_size or size
    return Pooled(h, ph), Pooled(w, pw)


def _check_shapes(expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} {shape}, got {tuple(tensor.shape)}")


def _check(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    parameters: Sequence[Tensor],
    pretrain_size: Sequence[int],
    k: Tensor | None,
    v: Tensor | None,
    kernel_size: int,
    local: Sequence[Tensor | None],
) -> None:
    if q.ndim != 5 or pool_k.ndim != 5 or pool_v.ndim != 5:
        raise ValueError(
            f"expected q [B, H, W, N, D], pool_k [B, PH, PW, N, D] and pool_v [B, PH, PW, N, Dv], got q "
            f"{tuple(q.shape)}, pool_k {tuple(pool_k.shape)}, pool_v {tuple(pool_v.shape)}"
        )
    b, h, w, n, d = q.shape
    pool, dv, hidden = pool_k.shape[1:3], pool_v.shape[4], parameters[2].shape[0]
    _check_shapes({"pool_k": (pool_k, (b, *pool, n, d)), "pool_v": (pool_v, (b, *pool, n, dv))})
    shapes = ((n,), (n, d), (hidden, 2), (hidden,), (n, hidden), (n,))
    names = ("temperature", "query_embedding", "cpb_weight1", "cpb_bias1", "cpb_weight2", "cpb_bias2")
    _check_shapes(dict(zip(names, zip(parameters, shapes, strict=True), strict=True)))
    if len(pretrain_size) != 2 or min(pretrain_size) < 1:
        raise ValueError(f"expected pretrain_size of 2 ints >= 1, got {list(pretrain_size)}")
    if (k is None) != (v is None) or (k is None and any(t is not None for t in local)):
        raise ValueError(
            "expected k and v together, and local_bias, tokens or token_bias only with them, got "
            + ", ".join("no" if t is None else "a" for t in (k, v, *local))
            + " k, v, local_bias, tokens, token_bias"
        )
    if k is not None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel_size >= 1, got {kernel_size}")
        slots = kernel_size**2
        _check_shapes({"k": (k, (b, h, w, n, d)), "v": (v, (b, h, w, n, dv))})
        shapes = ((n, slots), (n, d, slots), (n, slots))
        names = ("local_bias", "tokens", "token_bias")
        _check_shapes(dict(zip(names, zip(local, shapes, strict=True), strict=True)))
    check_dtypes(q, pool_k, pool_v, k, v)


def _no_autocast(device: torch.device) -> Any:
    """Logits and weights are made in float32 at least, in the backward pass too, which runs outside of autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _prepare(q: Tensor, temperature: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """softplus(temperature) and the other parameters in the dtype that logits are made in."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return [F.softplus(temperature.to(dtype)), *(None if t is None else t.to(dtype) for t in parameters)]


def _run(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    cpb_weight1: Tensor,
    cpb_bias1: Tensor,
    cpb_weight2: Tensor,
    cpb_bias2: Tensor,
    pretrain_size: list[int],
    bias_size: list[int],
    k: Tensor | None = None,
    v: Tensor | None = None,
    kernel_size: int = 3,
    local_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    cpb, local = (cpb_weight1, cpb_bias1, cpb_weight2, cpb_bias2), (local_bias, tokens, token_bias)
    _check(q, pool_k, pool_v, (temperature, query_embedding, *cpb), pretrain_size, k, v, kernel_size, local)
    axes = _bias_axes((*q.shape[1:3], *pool_k.shape[1:3]), bias_size)
    with _no_autocast(q.device):
        scale, embedding, *rest = _prepare(q, temperature, (query_embedding, *cpb, *local))
        args = (q, pool_k, pool_v, scale, embedding, rest[:4], axes, list(pretrain_size), k, v, kernel_size, *rest[4:])
        return dispatcher(backend, *args).to(pool_v.dtype)


def _fake(q: Tensor, pool_k: Tensor, pool_v: Tensor, *args: Any) -> Tensor:
    return pool_v.new_empty((*q.shape[:-1], pool_v.shape[-1]))


def _pairs(length: int, kernel_size: int) -> int:
    """How many pairs of tokens of an axis lie in one another's window."""
    return sum(max(length - abs(step), 0) for step in range(-(kernel_size // 2), kernel_size // 2 + 1))


def _flops(
    q_shape: Sequence[int],
    pool_k_shape: Sequence[int],
    pool_v_shape: Sequence[int],
    temperature_shape: Any,
    query_embedding_shape: Any,
    cpb_weight1_shape: Sequence[int],
    cpb_bias1_shape: Any,
    cpb_weight2_shape: Any,
    cpb_bias2_shape: Any,
    pretrain_size: Any,
    bias_size: Sequence[int],
    k_shape: Any = None,
    v_shape: Any = None,
    kernel_size: int = 3,
    local_bias_shape: Any = None,
    tokens_shape: Any = None,
    *args: Any,
) -> int:
    """Twice the multiply-adds for the pairs that take part, the learnable tokens and the bias of distinct distances."""
    b, h, w, n, d = q_shape
    pairs = h * w * pool_k_shape[1] * pool_k_shape[2]
    if k_shape is not None:
        pairs += _pairs(h, kernel_size) * _pairs(w, kernel_size)
    tokens = h * w * kernel_size**2 * d if tokens_shape is not None else 0
    axes = _bias_axes((h, w, *pool_k_shape[1:3]), bias_size)
    bias = len(axes[0].distances) * len(axes[1].distances) * cpb_weight1_shape[0] * (2 + n)
    return 2 * (b * n * (pairs * (d + pool_v_shape[4]) + tokens) + bias)


attend = define_op(
    "aggregated_attention(Tensor q, Tensor pool_k, Tensor pool_v, Tensor temperature, Tensor query_embedding, "
    "Tensor cpb_weight1, Tensor cpb_bias1, Tensor cpb_weight2, Tensor cpb_bias2, SymInt[] pretrain_size, "
    "SymInt[] bias_size, Tensor? k=None, Tensor? v=None, SymInt kernel_size=3, Tensor? local_bias=None, "
    "Tensor? tokens=None, Tensor? token_bias=None, str backend='auto') -> Tensor",
    _run,
    _fake,
    _flops,
    whole_on_cpu=True,
)


def aggregated_weights(
    q: Tensor,
    pool_k: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    cpb: Sequence[Tensor],
    pretrain_size: Sequence[int],
    bias_size: Sequence[int],
    k: Tensor | None,
    kernel_size: int,
    local_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """See `visattn.ops.aggregated_weights`."""
    local = (local_bias, None, None)
    _check(q, pool_k, pool_k, (temperature, query_embedding, *cpb), pretrain_size, k, k, kernel_size, local)
    axes = _bias_axes((*q.shape[1:3], *pool_k.shape[1:3]), bias_size)
    with _no_autocast(q.device):
        scale, embedding, *cpb, local_bias = _prepare(q, temperature, (query_embedding, *cpb, local_bias))
        q, pool_k, k = (None if x is None else x.to(scale.dtype) for x in (q, pool_k, k))
        _, local, pooled = reference_weights(
            q, pool_k, scale, embedding, cpb, axes, list(pretrain_size), k, kernel_size, local_bias
        )
    return local, pooled.unflatten(-1, tuple(pool_k.shape[1:3]))
