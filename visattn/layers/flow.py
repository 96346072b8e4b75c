"""Flow attention: keys compete for what they give to queries, which take it in by capacity."""

import torch
from torch import Tensor

from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import flow_attention, flow_weights

torch.fx.wrap("flow_attention")


class FlowAttention(TokenMixer):
    """Flow attention of a conserved flow from keys to queries; no parameters beyond the projections, no position.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Arguments and errors are those of `TokenMixer`. Source: Flowformer (arXiv:2202.06258), section 3.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        return flow_attention(q, k, v)

    def attended(self, x: Tensor, size: Size | None = None) -> dict[str, Tensor]:
        """How keys compete and queries are allocated, for the same arguments as `forward`.

        Returns:
            "competition" [B, H', W', N], the weight of every key's value, 1 on average, and "allocation" [B, H, W, N],
            how much every query takes in, from 0 to 1. With `size` given, of tokens: [B, M, N] and [B, L, N].
        """
        q, k, _, grid, kv_grid = self._project_tokens(x, size)
        allocation, competition = flow_weights(q, k)
        if size is None:
            allocation, competition = (
                allocation.unflatten(1, grid),
                competition.unflatten(1, kv_grid),
            )
        return {"competition": competition, "allocation": allocation}
