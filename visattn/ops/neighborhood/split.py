"""Neighborhood attention in two halves, for programs that want the weights in between; heads first.

By definition, with exact gradients. M keys of every query (and E extra ones) are copied, which
`neighborhood_attention` does not do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visattn.ops.checks import check_floating, check_shape
from visattn.ops.geometry import neighbors, outer_index, read_table
from visattn.ops.neighborhood import NeighborhoodProblem, windows_per_axis


def neighborhood_scores(
    q: Tensor,
    k: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    bias: Tensor | None = None,
    extra_k: Tensor | None = None,
) -> Tensor:
    """q k^T + bias for the keys that a query sees: [B, N, *spatial, D] -> [B, N, *spatial, M + E], extra keys last.

    Hidden keys of causal axes have -inf. Arguments as of `neighborhood_attention`, but for extra keys [B, N, E, D].
    """
    windows = kernel_size, dilation, stride, is_causal
    keys, hidden, displacement = _gather(q, k, extra_k, bias, *windows)
    query = q.flatten(2, -2)  # [B, N, S, D]
    scores = torch.einsum("bnsd,bnsmd->bnsm", query, keys)
    if bias is not None:
        scores = scores + read_table(bias.to(scores.dtype), displacement)  # [N, S, M]
    scores = scores.masked_fill(hidden, float("-inf"))
    if extra_k is not None:
        scores = torch.cat([scores, query @ extra_k.mT], -1)  # [B, N, S, M + E]
    return scores.unflatten(2, q.shape[2:-1])


def neighborhood_sum(
    weights: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    extra_v: Tensor | None = None,
) -> Tensor:
    """Sum values [B, N, *spatial, Dv] by weights [B, N, *spatial, M + E] that belong to `neighborhood_scores`.

    Weights of hidden keys count as 0. Extra values are [B, N, E, Dv]. Weights are cast to v's dtype: softmax is often
    computed in float32.
    """
    values, hidden, _ = _gather(v, v, extra_v, None, kernel_size, dilation, stride, is_causal)
    near, far = hidden.shape[1], 0 if extra_v is None else extra_v.shape[2]
    check_shape("weights", weights, (*v.shape[:-1], near + far), "([B, N, *spatial, M + E])")
    check_floating(weights=weights)
    weights = weights.to(v.dtype).flatten(2, -2)  # [B, N, S, M + E]
    of_near, of_far = weights.split([near, far], -1)  # [B, N, S, M], [B, N, S, E]
    out = torch.einsum("bnsm,bnsmd->bnsd", of_near.masked_fill(hidden, 0), values)
    out = out if extra_v is None else out + of_far @ extra_v
    return out.unflatten(2, v.shape[2:-1])


def _gather(
    q: Tensor,
    x: Tensor,
    extra: Tensor | None,
    bias: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Check the call; copy the M tokens of x that every query sees [B, N, S, M, D], tell which are hidden [S, M], and
    list their displacements per axis."""
    windows = windows_per_axis(q.ndim - 3, kernel_size, dilation, stride, is_causal)
    query, key = q.movedim(1, -2), x.movedim(1, -2)  # [B, *spatial, N, D]
    extra = None if extra is None else extra.transpose(1, 2)  # [B, E, N, D]
    more = bias, extra, extra, None, None, 1.0, False
    axes = NeighborhoodProblem(query, key, key, *windows, *more).axes
    found = [neighbors(axis, q.device) for axis in axes]
    index = outer_index([n.index for n in found], [axis.length for axis in axes])  # [S, M]
    hidden = outer_index([(~n.visible).long() for n in found], [2] * len(axes)) > 0
    seen = x.flatten(2, -2).index_select(2, index.flatten())  # [B, N, S M, D]
    seen = seen.unflatten(2, index.shape)  # [B, N, S, M, D]
    return seen, hidden, [n.displacement for n in found]
