"""Halo attention on channels-first maps, over `visattn.ops.halo_attention`."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visattn.layers.pool import create_pool
from visattn.ops import halo_attention

torch.fx.wrap("halo_attention")


class HaloAttention(nn.Module):
    """Blocked local self-attention: the queries of a block attend to the block and a halo of keys around it.

    Logits are `q.k / sqrt(dim_head) + q.(rel_h + rel_w)`, with a table of relative positions per axis that all heads
    share. There is no output projection. With stride 2 only every second position along each axis is a query; blocks
    whose size is odd are averaged 2x2 after attention instead, as timm does. Maps of any size: the last block of an
    axis may be cut short.

    Shapes: [B, dim, H, W] -> [B, dim_out, ceil(H / stride), ceil(W / stride)].

    Args:
        dim: Channels of the input.
        dim_out: Channels of the values and of the output; default `dim`.
        num_heads: Heads; they divide `dim_out`, and `dim` unless `dim_head` is given.
        dim_head: Channels of queries and keys per head; default `dim / num_heads`.
        block_size: Keys of a block per axis.
        halo_size: Keys around it on each side.
        stride: 1 or 2.
        mask_border: Keys outside the map take no part (the paper). False: they take part with zero key and value, so
            that a border query loses weight to them, as in timm's trained weights.

    Raises:
        ValueError: Heads, sizes or stride that do not fit.

    Source: arXiv:2103.12731, section 3; the relative term and the stride of even blocks as in timm (Apache-2.0).
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        mask_border: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % num_heads or (dim_head is None and dim % num_heads):
            expected = f"dim and dim_out divisible by {num_heads} heads"
            raise ValueError(f"expected {expected}, got {dim} and {dim_out}")
        if stride not in (1, 2):
            raise ValueError(f"expected stride 1 or 2, got {stride}")
        if block_size < 1 or halo_size < 0:
            got = f"{block_size} and {halo_size}"
            raise ValueError(f"expected block_size >= 1 and halo_size >= 0, got {got}")
        dd = {"device": device, "dtype": dtype}
        dim_head = dim // num_heads if dim_head is None else dim_head
        query_stride = stride if block_size % stride == 0 else 1
        self.num_heads = num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = query_stride
        self.mask_border = mask_border
        self.q = nn.Conv2d(dim, num_heads * dim_head, 1, stride=query_stride, bias=False, **dd)
        self.kv = nn.Conv2d(dim, num_heads * dim_head + dim_out, 1, bias=False, **dd)
        self.kv_split = [num_heads * dim_head, dim_out]
        table = 2 * (block_size + 2 * halo_size) - 1
        self.rel_h = nn.Parameter(torch.empty(table, dim_head, **dd))
        self.rel_w = nn.Parameter(torch.empty(table, dim_head, **dd))
        self.pool = nn.Identity() if query_stride == stride else create_pool("avg2")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal: projections with std dim^-0.5, tables with std dim_head^-0.5 (timm)."""
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.weight.shape[1] ** -0.5)
        for table in (self.rel_h, self.rel_w):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def _heads(self, x: Tensor) -> Tensor:
        """Split the heads of a map [B, N * D, H, W] into a view [B, H, W, N, D]."""
        return x.permute(0, 2, 3, 1).unflatten(-1, [self.num_heads, -1])  # [B, H, W, N, D]

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).split(self.kv_split, dim=1)
        q, k, v = (self._heads(t) for t in (self.q(x), k, v))
        sizes = {"block_size": self.block_size, "halo_size": self.halo_size, "stride": self.stride}
        tables = {"rel_h": self.rel_h, "rel_w": self.rel_w}
        x = halo_attention(q, k, v, **sizes, **tables, mask_border=self.mask_border)
        return self.pool(x.flatten(3).permute(0, 3, 1, 2))  # [B, dim_out, H', W']

    def extra_repr(self) -> str:
        sizes = f"block_size={self.block_size}, halo_size={self.halo_size}"
        return f"num_heads={self.num_heads}, {sizes}, mask_border={self.mask_border}"
