"""Attentions of linear cost as two matrix products for all heads at once, in the order that is cheaper.

Without gradients, on a CPU and on large maps, a sample at a time goes through in chunks of positions that fit a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import chunking
from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import is_symbolic

if TYPE_CHECKING:
    from visattn.ops import linear

Map = Callable[[Tensor], Tensor]
Read = Callable[[Tensor, Tensor | None], Tensor]
KeysOf, ReaderOf = Callable[[Tensor, Tensor], Map], Callable[[Tensor, Tensor, Tensor], Read]


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, quadratic: bool) -> Tensor:
    """Multiply scale * q k^T v: [B, L, N, D], [B, M, N, D], [B, M, N, Dv] -> [B, L, N, Dv]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, L, D], [B, N, M, D], [B, N, M, Dv]
    if v.dtype == torch.float16 and scale != 1:  # sums over positions may leave its range
        k, v, scale = k * scale**0.5, v * scale**0.5, 1.0
    if quadratic:
        return ((q @ k.mT * scale) @ v).transpose(1, 2)  # [B, L, N, Dv]
    k = contiguous_copy(k) if is_symbolic(*k.shape) else k.contiguous()
    return (q @ (k.mT @ v * scale)).transpose(1, 2)  # [B, L, N, Dv]


def _streams(problem: linear.LinearProblem) -> bool:
    """Tell whether a map goes through in chunks of positions."""
    q, k, v = problem.q, problem.k, problem.v
    if q.device.type != "cpu" or is_symbolic(*q.shape, *k.shape):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or problem.trains():
        return False
    return math.prod(v.shape[1:]) >= chunking.STREAMED and not problem.is_quadratic


def _rows(v: Tensor) -> int:
    """Count the positions of a chunk."""
    return max(1, chunking.CHUNK // math.prod(v.shape[2:]))


def _stream(qkv: Sequence[Tensor], keys_of: KeysOf, reader_of: ReaderOf) -> Tensor:
    """Attend [B, L, N, D] to [B, M, N, D] through a context, a sample at a time -> [B, L, N, Dv].

    For a sample's queries [L, N, D] and keys [M, N, D], `keys_of` gives the map that some keys go through; for the
    context sum(keys v^T) [N, D, Dv], sum(keys) [N, D] and values [M, N, Dv], `reader_of` gives the map from queries
    [l, N, D] to the output [N, l, Dv], which it writes into its second argument if there is one.
    """
    (q, k, v), dtype = qkv, torch.promote_types(qkv[2].dtype, torch.float32)
    rows, out = _rows(v), v.new_empty((*q.shape[:-1], v.shape[-1]))
    for query, key, value, result in zip(q, k, v, out, strict=True):
        keys = keys_of(query, key)
        total = torch.zeros(key.shape[1:], dtype=dtype)
        context = torch.zeros((*key.shape[1:], value.shape[-1]), dtype=dtype)
        for some, values in zip(key.split(rows), value.split(rows), strict=True):
            some = keys(some.to(dtype))
            # [N, D, m] and [N, m, Dv]
            context.baddbmm_(some.permute(1, 2, 0), values.to(dtype).transpose(0, 1))
            total += some.sum(0)
        read = reader_of(context, total, value)
        for some, results in zip(query.split(rows), result.split(rows), strict=True):
            results = results.transpose(0, 1)  # [N, l, Dv]
            if results.dtype == dtype:
                read(some, results)
            else:
                results.copy_(read(some.to(dtype), None))
    return out


def attend_efficient(problem: linear.EfficientProblem) -> Tensor:
    """See `visattn.ops.efficient_attention`."""
    (q, k, v), dtype = problem.flat(), problem.dtype
    hidden, hidden_queries = problem.hidden()
    if hidden is not None:
        k, v = k.to(dtype).masked_fill(hidden, torch.finfo(dtype).min), v.masked_fill(hidden, 0)
    if hidden_queries is not None:
        q = q.masked_fill(hidden_queries, 0)

    def keys_of(query: Tensor, key: Tensor) -> Map:
        most = key.amax(0).to(dtype)
        return lambda key: (key - most).exp_()

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context = context / total[..., None]
        return lambda query, out: torch.bmm(query.softmax(-1).transpose(0, 1), context, out=out)

    if _streams(problem):
        out = _stream((q, k, v), keys_of, reader_of)
    else:
        # Heads first, as `_products` multiplies them: softmax of another layout costs further copies.
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [B, N, L, D], [B, N, M, D]
        q, k = q.softmax(-1, dtype=dtype).to(v.dtype), k.softmax(-2, dtype=dtype).to(v.dtype)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # [B, L, N, D], [B, M, N, D]
        out = _products(q, k, v, 1.0, problem.is_quadratic)
    return problem.unflat(out if hidden_queries is None else out.masked_fill(hidden_queries, 0))


def attend_inline(problem: linear.InlineProblem) -> Tensor:
    """See `visattn.ops.inline_attention`."""
    (q, k, v), dtype = problem.flat(), problem.dtype
    scale = problem.scale / math.prod(problem.key_size)

    def keys_of(query: Tensor, key: Tensor) -> Map:
        mean = key.mean(0, dtype=dtype)
        return lambda key: key - mean

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context, mean = context * scale, value.mean(0, dtype=dtype)[:, None]
        return lambda query, out: torch.baddbmm(mean, query.transpose(0, 1), context, out=out)

    if _streams(problem):
        return problem.unflat(_stream((q, k, v), keys_of, reader_of))
    out = _products(q, k - k.mean(1, keepdim=True), v, scale, problem.is_quadratic)
    return problem.unflat(out + v.mean(1, keepdim=True))


def _focus(x: Tensor, scale: Tensor, factor: float) -> Tensor:
    """Sharpen [..., N, D] -> f(x) [..., N, D], float32 at least."""
    inverse = 1 / scale.flatten()
    y = torch.addcmul(1e-6 * inverse, x.flatten(-2).to(scale.dtype).relu(), inverse)  # [..., N D]
    length = y.norm(dim=-1, keepdim=True)
    # Short vectors are lengthened before the power, which would underflow; to its direction that makes no difference.
    powered = (y / length.detach().clamp(max=1)) ** factor
    return (powered * (length / powered.norm(dim=-1, keepdim=True))).view(x.shape)


def _in_range(q: Tensor, k: Tensor, problem: linear.LinearProblem) -> tuple[Tensor, Tensor, float]:
    """Cast queries and keys whose products are weights to the inputs' dtype; those are times the last result then.

    In float16 a channel's mean over the keys moves from these to the queries: small keys, and queries over the large or
    small normalisers that keys make, would leave its range. So keys are at most M ** 0.5, and queries near 1.
    """
    dtype, root = problem.v.dtype, math.prod(problem.key_size) ** 0.5
    if dtype != torch.float16:
        return q.to(dtype), k.to(dtype), 1.0
    mean = k.mean(1, keepdim=True, dtype=problem.dtype).detach()  # [B, 1, N, D]
    mean = mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return (q * (mean * root**2)).to(dtype), (k / (mean * root)).to(dtype), 1 / root


def focused_pair(problem: linear.FocusedProblem) -> tuple[Tensor, Tensor, float]:
    """Normalise f(q), and give f(k): [B, L, N, D], [B, M, N, D]; weights are their products times the last result."""
    (q, k, _), positions = problem.flat(), math.prod(problem.key_size)
    scale = F.softplus(problem.focus_scale.to(problem.dtype))
    q, k = _focus(q, scale, problem.factor), _focus(k, scale, problem.factor)
    total = q.transpose(1, 2) @ k.mean(1, keepdim=True).permute(0, 2, 3, 1) + 1e-6  # [B, N, L, 1]
    return _in_range(q / (total.transpose(1, 2) * positions), k, problem)


def attend_focused(problem: linear.FocusedProblem) -> Tensor:
    """See `visattn.ops.focused_linear_attention`."""
    positions = math.prod(problem.key_size)

    def keys_of(query: Tensor, key: Tensor) -> Map:
        return lambda key: _focus(key, scale, problem.factor)

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context, mean = context / positions, total[..., None] / positions

        def read(query: Tensor, out: Tensor | None) -> Tensor:
            query = _focus(query, scale, problem.factor).transpose(0, 1)  # [N, l, D]
            return torch.bmm(query / (query @ mean + 1e-6), context, out=out)

        return read

    if _streams(problem):
        scale = F.softplus(problem.focus_scale.to(problem.dtype))
        return problem.unflat(_stream(problem.flat(), keys_of, reader_of))
    q, k, factor = focused_pair(problem)
    return problem.unflat(_products(q, k, problem.v.flatten(1, -3), factor, problem.is_quadratic))


def relu_pair(problem: linear.ReluProblem) -> tuple[Tensor, Tensor, float]:
    """Normalise relu(q), and give relu(k): [B, L, N, D], [B, M, N, D]; weights are their products times the last."""
    q, k, _ = problem.flat()
    q, k, dtype = q.relu(), k.relu(), problem.dtype
    total = k.sum(1, keepdim=True, dtype=dtype).permute(0, 2, 3, 1)  # [B, N, D, 1]
    total = (q.to(dtype).transpose(1, 2) @ total).transpose(1, 2)  # [B, L, N, 1]
    factor = problem.temperature.to(dtype)[:, None] / total.clamp(min=problem.floor)
    return _in_range(q * factor, k, problem)


def attend_relu(problem: linear.ReluProblem) -> Tensor:
    """See `visattn.ops.relu_linear_attention`."""

    def keys_of(query: Tensor, key: Tensor) -> Map:
        return torch.relu

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context = context * problem.temperature.to(context.dtype)[:, None, None]

        def read(query: Tensor, out: Tensor | None) -> Tensor:
            query = query.relu().transpose(0, 1)  # [N, l, D]
            query = query / (query @ total[..., None]).clamp_(min=problem.floor)
            return torch.bmm(query, context, out=out)

        return read

    if _streams(problem):
        return problem.unflat(_stream(problem.flat(), keys_of, reader_of))
    q, k, factor = relu_pair(problem)
    return problem.unflat(_products(q, k, problem.v.flatten(1, -3), factor, problem.is_quadratic))


_EPS = 1e-6


def _flow(x: Tensor, total: Tensor) -> Tensor:
    """Measure what tokens [..., N, D] exchange with others, of which `total` is the sum: [..., N, 1]."""
    total = total + _EPS
    return (x * total).sum(-1, keepdim=True) + _EPS * (total.sum(-1, keepdim=True) + 1)


def flow_pair(problem: linear.LinearProblem) -> tuple[Tensor, Tensor, float]:
    """Allocate queries and let keys compete, [B, L, N, D], [B, M, N, D]; weights are their products times the last."""
    (q, k, _), queries, keys = problem.flat(), math.prod(problem.size), math.prod(problem.key_size)
    q, k = q.to(problem.dtype).sigmoid(), k.to(problem.dtype).sigmoid()
    incoming, outgoing = _flow(q, k.sum(1, keepdim=True)), _flow(k, q.sum(1, keepdim=True))
    conserved = _flow(q, (k / outgoing).sum(1, keepdim=True))  # [B, L, N, 1]
    sent = _flow(k, (q / incoming).sum(1, keepdim=True))  # [B, M, N, 1]
    q = q * ((conserved * (queries / keys)).sigmoid() / incoming)
    return _in_range(q, k * (sent.clamp(-1, 1).softmax(1) * keys), problem)


def attend_flow(problem: linear.LinearProblem) -> Tensor:
    """See `visattn.ops.flow_attention`."""
    queries, keys, flows = math.prod(problem.size), math.prod(problem.key_size), {}

    def added(x: Tensor, of: Map = lambda x: x) -> Tensor:
        """Sum over the positions of [M, N, D], a chunk at a time: [N, D]."""
        parts = x.split(_rows(problem.v.flatten(1, -3)))
        return torch.stack([of(part.to(problem.dtype).sigmoid()).sum(0) for part in parts]).sum(0)

    def keys_of(query: Tensor, key: Tensor) -> Map:
        sources, sinks = added(key), added(query)  # [N, D]
        sent = added(query, lambda q: q / _flow(q, sources))
        flows.update(
            sources=sources, received=added(key, lambda k: k / _flow(k, sinks)), competition=0
        )

        def compete(key: Tensor) -> Tensor:
            key = key.sigmoid()
            competition = _flow(key, sent).clamp_(-1, 1).exp_()  # [m, N, 1]
            flows["competition"] += competition.sum(0)
            return key * competition

        return compete

    def reader_of(context: Tensor, total: Tensor, value: Tensor) -> Read:
        context = context * (keys / flows["competition"][..., None])

        def read(query: Tensor, out: Tensor | None) -> Tensor:
            query = query.sigmoid()
            allocation = (_flow(query, flows["received"]) * (queries / keys)).sigmoid()
            query = query * (allocation / _flow(query, flows["sources"]))  # [l, N, D]
            return torch.bmm(query.transpose(0, 1), context, out=out)

        return read

    if _streams(problem):
        return problem.unflat(_stream(problem.flat(), keys_of, reader_of))
    q, k, factor = flow_pair(problem)
    return problem.unflat(_products(q, k, problem.v.flatten(1, -3), factor, problem.is_quadratic))


def _convolve_by_taps(problem: linear.DynamicConvProblem) -> Tensor:
    """Sum K * K shifted maps [B, H, W, C] times their taps: no group, and no loop, over images."""
    x, (h, w), size = problem.x, problem.x.shape[1:3], problem.kernel_size
    kernels = problem.kernels[:, None, None]  # [B, 1, 1, C, K K]
    x, out = F.pad(x, [0, 0, *[size // 2] * 4]), torch.zeros_like(x)
    row, column = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    for i in range(size):
        rows = x.index_select(1, row + i)  # [B, H, W + K - 1, C]
        for j in range(size):
            out = out + rows.index_select(2, column + j) * kernels[..., i * size + j]
    return out


def convolve(problem: linear.DynamicConvProblem) -> Tensor:
    """See `visattn.ops.dynamic_depthwise_conv`."""
    x, size = problem.x, problem.kernel_size
    # An exported convolution has a number of groups: here that of the images times channels.
    of_any_batch = torch.compiler.is_exporting() and is_symbolic(x.shape[0])
    if is_symbolic(*x.shape[1:]) or of_any_batch or torch.jit.is_tracing() or not x.shape[0]:
        return _convolve_by_taps(problem)
    b, h, w, c = x.shape
    maps = x.permute(0, 3, 1, 2)  # [B, C, H, W]
    weight = problem.kernels.unflatten(-1, (1, size, size))  # [B, C, 1, K, K]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # PyTorch has a fast depthwise convolution of channels-last maps, but with a batch of kernels no such layout.
        images = zip(maps.split(1), weight, strict=True)
        out = [F.conv2d(image, k, padding=size // 2, groups=c) for image, k in images]
        return torch.cat(out).permute(0, 2, 3, 1)  # [B, H, W, C]
    maps = maps.reshape(1, b * c, h, w)
    weight = weight.flatten(0, 1)  # [B C, 1, K, K]
    out = F.conv2d(maps, weight, padding=size // 2, groups=b * c).view(b, c, h, w)
    return out.permute(0, 2, 3, 1)  # [B, H, W, C]
