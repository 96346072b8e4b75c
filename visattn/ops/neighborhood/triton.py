"""Neighborhood attention by the fused Triton kernels; see `visattn.ops.fused`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from visattn.ops.neighborhood import NeighborhoodProblem


def attend(problem: NeighborhoodProblem) -> Tensor | tuple[Tensor, Tensor]:
    """See `visattn.ops.neighborhood_attention`."""
    from visattn.ops.fused.attention import flat, fused_attention

    q, extra_bias = problem.q, problem.extra_bias
    extra_k, extra_v = problem.extra_k, problem.extra_v
    if extra_k is not None and extra_k.shape[1] == 0:
        extra_k = extra_v = extra_bias = None
    if extra_bias is not None:
        # One axis of tokens instead of the spatial ones: all of them, or 1 if the bias is the same for all tokens.
        wide = extra_bias.expand(*(1,) * (q.ndim - extra_bias.ndim), *extra_bias.shape)
        spatial = (1,) * len(problem.size) if wide.shape[1:-2].numel() == 1 else q.shape[1:-2]
        extra_bias = flat(wide.expand(-1, *spatial, -1, -1))  # [B or 1, S or 1, N or 1, E or 1]
    qkv = flat(q), flat(problem.k), flat(problem.v)
    how = {"bias": problem.bias, "extra_k": extra_k, "extra_v": extra_v, "extra_bias": extra_bias}
    key_mask = None if problem.key_mask is None else problem.key_mask.flatten(1)  # [B, S]
    out, lse = fused_attention(*qkv, problem.axes, problem.scale, **how, key_mask=key_mask)
    out = out.view(*q.shape[:-1], problem.v.shape[-1])  # [B, *spatial, N, Dv]
    return (out, lse.view(q.shape[:-1])) if problem.return_lse else out
