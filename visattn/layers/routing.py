"""Bi-level routing attention over `visattn.ops.bilevel_routing_attention`, channels-last."""

import reprlib
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from visattn.layers.attention import weight_and_bias
from visattn.layers.conv import DepthwiseConv
from visattn.ops import bilevel_routing_attention, fit, pad_to_multiple, region_routing
from visattn.ops.checks import check_choice

torch.fx.wrap("bilevel_routing_attention")
torch.fx.wrap("fit")
torch.fx.wrap("pad_to_multiple")

_KV_POOLS = {"identity": "none", "avgpool": "avg", "maxpool": "max"}
_KV_POOLS |= {"ada_avgpool": "ada_avg", "ada_maxpool": "ada_max"}


class BiLevelRoutingAttention(nn.Module):
    """Multi-head attention of each region of the map to the `topk` regions that suit it best, plus LePE.

    The map is cut into `n_win` x `n_win` regions. Means of queries and keys over each region give a graph, the same for
    all heads: the `topk` regions of highest q.k. Queries then attend to the tokens of these regions. A depthwise
    convolution of the values (LePE) is added before the output projection.

    `padding` tells what happens on a map that `n_win` does not divide; where it does, all three are the same.
        * "mask": regions have ceil(size / n_win) tokens per axis. Those at the right and bottom are cut short, and may
          be fewer. Tokens outside the map take no part: not in means, nor as keys, nor for LePE.
        * "project": the official `auto_pad`. The map is zero-padded at the right and bottom before the projection;
          padding tokens carry the bias of `qkv`, count in means and are keys. The output is cropped.
        * "zero": the official operator for channels-first maps. Regions have max(1, size // n_win) tokens per axis, so
          that there may be more of them than `n_win`; keys outside the map take part, with k = v = 0.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], any H and W.

    Args:
        dim: Channels.
        num_heads: Heads; they divide `dim` and `qk_dim`.
        n_win: Regions per axis.
        topk: Regions that a region attends to; all of them where there are fewer.
        qk_dim: Channels of queries and keys, all heads together; default `dim`.
        qk_scale: Factor of q.k in routing and attention; default `qk_dim ** -0.5`, the width of all heads together, as
            the official weights were trained.
        side_dwconv: Kernel of LePE; 0 leaves it out.
        kv_downsample_mode: Pooling of keys and values inside each region before attention: "identity" (none),
            "avgpool" or "maxpool" (of `kv_downsample_ratio`), "ada_avgpool" or "ada_maxpool" (to `kv_per_win`). Pooling
            needs regions that fill the map: `padding="project"` for maps of any size.
        kv_downsample_ratio: Tokens per axis that are pooled into one.
        kv_per_win: Tokens per axis that are left of a region.
        param_attention: "qkvo", or "qkv" without the output projection.
        param_routing: A linear layer on both region means; needs `diff_routing`.
        diff_routing: Gradients reach queries and keys through the routing weights, too; needs `soft_routing`.
        soft_routing: Keys and values are multiplied by the routing weight of their region, a softmax over the `topk`.
        padding: "mask", "project" or "zero", see above.

    Raises:
        ValueError: Widths, `topk`, names or combinations that do not fit.
        NotImplementedError: Options that the official code names but does not have either.

    Source: arXiv:2303.08810, section 3.2; parameters as in rayleizhu/BiFormer (MIT).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int | tuple[int, int] = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratio: int = 4,
        kv_per_win: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        padding: str = "mask",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        qk_dim = qk_dim or dim
        if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
            got = f"{dim}, {qk_dim} and {num_heads}"
            raise ValueError(f"expected dim and qk_dim divisible by num_heads, got {got}")
        if min(to_2tuple(n_win)) < 1 or topk < 1:
            raise ValueError(f"expected n_win and topk of at least 1, got {n_win} and {topk}")
        check_choice("padding", padding, ("mask", "project", "zero"))
        check_choice("param_attention", param_attention, ("qkvo", "qkv"))
        _check_routing(param_routing, diff_routing, soft_routing)
        self.num_heads = num_heads
        self.n_win = list(to_2tuple(n_win))
        self.topk = topk
        self.scale = qk_scale or qk_dim**-0.5
        self.diff_routing = diff_routing
        self.soft_routing = soft_routing
        self.padding = padding
        self.rule = "zero" if padding == "zero" else "mask"
        self.kv_pool, self.kv_size = _kv_pool(kv_downsample_mode, kv_downsample_ratio, kv_per_win)
        self.split = [qk_dim, qk_dim, dim]
        self.qkv = nn.Linear(dim, sum(self.split), **dd)
        self.router = nn.Linear(qk_dim, qk_dim, **dd) if param_routing else None
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if side_dwconv else None
        self.proj = nn.Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [B, H, W, dim] to q, k, v [B, H', W', N, D], views of one projection; padded for "project"."""
        if self.padding == "project":
            x = pad_to_multiple(x, self.n_win)
        q, k, v = self.qkv(x).split(self.split, dim=-1)
        q, k, v = (t.unflatten(-1, [self.num_heads, -1]) for t in (q, k, v))  # [B, H', W', N, D]
        return q, k, v

    def _routing(self, x: Tensor) -> dict[str, Any]:
        """The arguments of the op that choose regions, for the input x."""
        routing = {"n_win": self.n_win, "topk": self.topk, "rule": self.rule, "scale": self.scale}
        if self.router is not None:
            routing["router_weight"], routing["router_bias"] = weight_and_bias(self.router, x)
        return routing

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        q, k, v = self._project(x)
        weights = {"soft": self.soft_routing, "diff": self.diff_routing}
        pool, how = {"kv_pool": self.kv_pool, "kv_size": self.kv_size}, self._routing(x)
        out = bilevel_routing_attention(q, k, v, **how, **weights, **pool, return_lse=False)
        out = out.flatten(3)  # [B, H', W', C]
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(3))  # [B, H', W', C]
        if self.padding == "project":
            out = fit(out, [h, w])
        return self.proj(out)

    def attended(self, x: Tensor) -> dict[str, Tensor]:
        """What the queries of `forward(x)` attend to.

        Returns:
            "regions" [B, 1, R, topk]: for each of the R regions, in row-major order, those that it attends to, best
            first; "weights", of the same shape: their routing weights, which sum to 1.
        """
        q, k, _ = self._project(x)
        index, weights = region_routing(q, k, **self._routing(x))
        return {"regions": index, "weights": weights}

    def extra_repr(self) -> str:
        regions = f"n_win={self.n_win}, topk={self.topk}"
        return f"num_heads={self.num_heads}, {regions}, padding={self.padding!r}"


def _check_routing(param_routing: bool, diff_routing: bool, soft_routing: bool) -> None:
    if param_routing and not diff_routing:
        expected = "diff_routing with param_routing, whose weights would get no gradient"
        raise ValueError(f"expected {expected}; got False")
    if diff_routing and not soft_routing:
        raise NotImplementedError(
            "diff_routing without soft_routing is hard routing, which the official code names and does not implement; "
            "try soft_routing=True"
        )


def _kv_pool(mode: str, ratio: int, per_win: int) -> tuple[str, int]:
    """The op's name and size of a pooling of keys and values."""
    if mode in ("fracpool", "conv"):
        raise NotImplementedError(
            f"kv_downsample_mode {reprlib.repr(mode):.80} is named by the official code, which does not implement it; "
            f"try one of {sorted(_KV_POOLS)}"
        )
    if mode not in _KV_POOLS:
        got = f"{reprlib.repr(mode):.80}"
        raise ValueError(f"expected kv_downsample_mode of {sorted(_KV_POOLS)}, got {got}")
    size = 1 if mode == "identity" else per_win if mode.startswith("ada") else ratio
    if size < 1:
        name = "kv_per_win" if mode.startswith("ada") else "kv_downsample_ratio"
        raise ValueError(f"expected {name} of at least 1 for {reprlib.repr(mode):.80}, got {size}")
    return ("none", 1) if size == 1 and not mode.startswith("ada") else (_KV_POOLS[mode], size)
