"""Attentions of linear cost as two matrix products for all heads at once, in the order that is cheaper.

Without gradients, on a CPU and on large maps, a sample at a time goes through in chunks of positions that fit a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**18  # elements
_STREAMED = 2**17  # elements of a sample's values from which chunks pay for the calls that they cost

Map = Callable[[Tensor], Tensor]
Read = Callable[[Tensor, Tensor | None], Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def is_quadratic(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether (q k^T) v of [B, S, N, D] takes fewer multiplications than q (k^T v)."""
    queries, keys, d, dv = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
    return queries * keys * (d + dv) < (queries + keys) * d * dv


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, quadratic: bool) -> Tensor:
    """scale * q k^T v of [B, N, L, D], [B, N, M, D], [B, N, M, Dv]."""
    if v.dtype == torch.float16 and scale != 1:  # sums over positions may leave its range
        k, v, scale = k * scale**0.5, v * scale**0.5, 1.0
    return (q @ k.mT * scale) @ v if quadratic else q @ (k.contiguous().mT @ v * scale)


def _streams(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, *others))
    large = math.prod(v.shape[1:]) >= _STREAMED and not is_quadratic(q, k, v)
    return large and q.device.type == "cpu" and not traced and not trained


def _stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys_of: Callable[[Tensor], Map],
    reader_of: Callable[[Tensor, Tensor, Tensor], Read],
) -> Tensor:
    """Attention of [B, S, N, D] through a context, a sample at a time.

    For a sample's keys [M, N, D], `keys_of` gives the map that some of them go through; for the context sum(keys v^T)
    [N, D, Dv], sum(keys) [N, D] and values [M, N, Dv], `reader_of` gives the map from queries [l, N, D] to the output
    [N, l, Dv], which it writes into its second argument if there is one.
    """
    dtype, rows = _wide(v), max(1, _CHUNK // math.prod(v.shape[2:]))
    out = v.new_empty((*q.shape[:-1], v.shape[-1]))
    for query, key, value, result in zip(q, k, v, out, strict=True):
        keys = keys_of(key)
        total = torch.zeros(key.shape[1:], dtype=dtype)
        context = torch.zeros((*key.shape[1:], value.shape[-1]), dtype=dtype)
        for some, values in zip(key.split(rows), value.split(rows), strict=True):
            some = keys(some.to(dtype))
            context.baddbmm_(some.permute(1, 2, 0), values.to(dtype).transpose(0, 1))
            total += some.sum(0)
        read = reader_of(context, total, value)
        for some, results in zip(query.split(rows), result.split(rows), strict=True):
            results = results.transpose(0, 1)
            if results.dtype == dtype:
                read(some, results)
            else:
                results.copy_(read(some.to(dtype), None))
    return out


def efficient_eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    shape, dtype, same = q.shape[:-1], _wide(v), q.shape[1:-2] == k.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    hidden = None if mask is None else ~mask.flatten(1)[:, :, None, None]
    if hidden is not None:
        k, v = k.to(dtype).masked_fill(hidden, torch.finfo(dtype).min), v.masked_fill(hidden, 0)
        q = q.masked_fill(hidden, 0) if same else q

    def keys_of(key: Tensor) -> Map:
        most = key.amax(0).to(dtype)
        return lambda key: (key - most).exp_()

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context = context / total[..., None]
        return lambda query, out: torch.bmm(query.softmax(-1).transpose(0, 1), context, out=out)

    if _streams(q, k, v):
        out = _stream(q, k, v, keys_of, reader_of)
    else:
        quadratic = is_quadratic(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = q.softmax(-1, dtype=dtype).to(v.dtype), k.softmax(-2, dtype=dtype).to(v.dtype)
        out = _products(q, k, v, 1.0, quadratic).transpose(1, 2)
    if hidden is not None and same:
        out = out.masked_fill(hidden, 0)
    return out.reshape(*shape, v.shape[-1])


def inline_eager(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    shape, dtype = q.shape[:-1], _wide(v)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    scale = scale / k.shape[1]

    def keys_of(key: Tensor) -> Map:
        mean = key.mean(0, dtype=dtype)
        return lambda key: key - mean

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context, mean = context * scale, value.mean(0, dtype=dtype)[:, None]
        return lambda query, out: torch.baddbmm(mean, query.transpose(0, 1), context, out=out)

    if _streams(q, k, v):
        return _stream(q, k, v, keys_of, reader_of).view(*shape, -1)
    quadratic = is_quadratic(q, k, v)
    k = k - k.mean(1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = _products(q, k, v, scale, quadratic) + v.mean(-2, keepdim=True)
    return out.transpose(1, 2).reshape(*shape, -1)


def focus(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """f of [..., N, D], float32 at least."""
    inverse = 1 / scale.flatten()
    y = torch.addcmul(1e-6 * inverse, x.flatten(-2).to(scale.dtype).relu(), inverse)
    length = y.norm(dim=-1, keepdim=True)
    # Short vectors are lengthened before the power, which would underflow; to its direction that makes no difference.
    powered = (y / length.detach().clamp(max=1)) ** factor
    return (powered * (length / powered.norm(dim=-1, keepdim=True))).view(x.shape)


def focused_eager(q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor, factor: float) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    shape, dtype = q.shape[:-1], _wide(v)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    scale, positions = F.softplus(focus_scale.to(dtype)), k.shape[1]

    def keys_of(key: Tensor) -> Map:
        return lambda key: focus(key, scale, factor)

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context, mean = context / positions, total[..., None] / positions

        def read(query: Tensor, out: Tensor | None) -> Tensor:
            query = focus(query, scale, factor).transpose(0, 1)
            return torch.bmm(query / (query @ mean + 1e-6), context, out=out)

        return read

    if _streams(q, k, v, focus_scale):
        return _stream(q, k, v, keys_of, reader_of).view(*shape, -1)
    quadratic = is_quadratic(q, k, v)
    q, k = (focus(x, scale, factor).transpose(1, 2) for x in (q, k))
    q = q / (q @ k.mean(-2)[..., None] + 1e-6)
    out = _products(q.to(v.dtype), k.to(v.dtype), v.transpose(1, 2), 1 / positions, quadratic)
    return out.transpose(1, 2).reshape(*shape, -1)


def dynamic_conv_eager(x: Tensor, kernels: Tensor) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    b, h, w, c = x.shape
    size = math.isqrt(kernels.shape[-1])
    maps, weight = x.permute(0, 3, 1, 2), kernels.unflatten(-1, (1, size, size))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # PyTorch has a fast depthwise convolution of channels-last maps, but with a batch of kernels no such layout.
        out = [F.conv2d(m, k, padding=size // 2, groups=c) for m, k in zip(maps.split(1), weight, strict=True)]
        return torch.cat(out).permute(0, 2, 3, 1)
    maps, weight = maps.reshape(1, b * c, h, w), weight.flatten(0, 1)
    return F.conv2d(maps, weight, padding=size // 2, groups=b * c).view(b, c, h, w).permute(0, 2, 3, 1)
