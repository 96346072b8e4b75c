"""ConViT's gated positional self-attention over `visattn.ops.gated_positional_attention`, on maps of any size."""

import math

import torch
from torch import Tensor, nn

from visattn.layers.attention import MultiHeadAttention, weight_and_bias
from visattn.ops import gated_positional_attention, gated_positional_weights
from visattn.ops.autocast import without_autocast

torch.fx.wrap("gated_positional_attention")


class GatedPositionalAttention(MultiHeadAttention):
    """Attention whose heads mix content and relative position, each by a gate that it learns.

    It starts as a convolution: values are the tokens themselves, and the heads of a square look at the tokens of a
    square around the query.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, H * W, dim] -> the same.

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.
        locality_strength: How sharply heads look at their place when they start.

    Raises:
        ValueError: Heads that do not divide the channels.

    Source: ConViT (arXiv:2103.10697), section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, qkv_bias, proj_drop, **dd)
        self.locality_strength = locality_strength
        self.pos_proj = nn.Linear(3, num_heads, **dd)
        self.gating_param = nn.Parameter(torch.empty(num_heads, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The convolution that it starts as, with gates of 0.73; queries, keys and output projection stay.

        Head h1 + k * h2 of the first k * k looks at the token (h1, h2) of a square around the query. The gradient of
        `pos_proj.bias` is 0: it is the same for all keys.
        """
        nn.init.ones_(self.gating_param)
        nn.init.zeros_(self.pos_proj.bias)
        side = math.isqrt(self.num_heads)
        place = torch.arange(side, dtype=torch.float32) - (side - 1) / 2  # [k]
        dy, dx = torch.meshgrid(
            2 * place, 2 * place, indexing="xy"
        )  # [k, k], h1 along the last axis
        weight = torch.stack([dx, dy, torch.full_like(dx, -1)], -1).flatten(0, 1)  # [k * k, 3]
        self.pos_proj.weight[: side**2] = weight.to(self.pos_proj.weight)
        self.pos_proj.weight *= self.locality_strength
        self.qkv.weight[-self.qkv.in_features :] = torch.eye(self.qkv.in_features).to(
            self.qkv.weight
        )

    def init_weights(self) -> None:
        """What timm calls after it has initialised the linear layers."""
        self.reset_parameters()

    def _position(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return weight_and_bias(self.pos_proj, x)  # [N, 3], [N]

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        maps = x if size is None else x.unflatten(1, size)
        q, k, v = self._project(maps)  # [B, H, W, N, D]
        out = gated_positional_attention(q, k, v, self.gating_param, *self._position(x))
        return self.proj_drop(self.proj(out.flatten(3).reshape(x.shape)))

    def attended(self, x: Tensor, size: list[int] | None = None) -> dict[str, Tensor]:
        """What the queries of `forward(x, size)` attend to, and how far away it is.

        Returns:
            "content" [B, H, W, N, H, W] and "positional" [H, W, N, H, W]: weights of keys, of queries on the first H,
            W; "gate" [N]: the share of the positional ones; "distance" [B, N]: from query to key in tokens, weighted so
            and averaged over the queries.
        """
        maps = x if size is None else x.unflatten(1, size)
        q, k, _ = self._project(maps)
        content, positional = gated_positional_weights(q, k, *self._position(x))
        gate = self.gating_param.to(content.dtype).sigmoid()
        rows, columns = (
            torch.arange(n, dtype=content.dtype, device=x.device) for n in content.shape[1:3]
        )
        dy, dx = rows - rows[:, None], columns - columns[:, None]  # [H, H], [W, W]
        distance = torch.hypot(dy[:, None, :, None], dx[None, :, None])  # [H, W, H, W]
        with without_autocast(x.device):
            far = [
                torch.einsum("...nij,...ij->...n", w, distance) for w in (content, positional)
            ]  # [..., H, W, N]
            distance = torch.lerp(far[0], far[1].expand_as(far[0]), gate).mean((1, 2))  # [B, N]
        return {"gate": gate, "distance": distance, "content": content, "positional": positional}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
