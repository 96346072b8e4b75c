"""Swin's attention within windows, shifted by half a window in every other block, on maps of any size."""

from typing import cast

import torch
from torch import Tensor

from visattn.layers.window import WindowAttention
from visattn.ops import fit, pad_to_multiple, resize_rel_pos, window_attention
from visattn.ops.geometry import ceil_div

torch.fx.wrap("fit")
torch.fx.wrap("pad_to_multiple")
torch.fx.wrap("resize_rel_pos")
torch.fx.wrap("window_attention")


class ShiftedWindowAttention(WindowAttention):
    """Multi-head attention within windows, with a relative position table; padding tokens take part.

    A map that the windows do not divide is zero-padded at the bottom and right before the projection, so that padding
    tokens are keys that carry the bias of `qkv`, and cropped after the attention, as in the official dense code.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        window_size: Tokens per axis of a window.
        shifted: The tiling starts half a window (rounded down) before the map, so that windows lie across the borders
            of those without it. An axis that one window covers is not shifted.
        always_shift: Shift such an axis as well, which cuts it into two windows.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.

    Raises:
        ValueError: Heads that do not divide the channels, or a window below 1.

    Sources: Swin (arXiv:2103.14030, section 3.2); `always_shift` as in its detectors and segmenters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] = 7,
        shifted: bool = False,
        always_shift: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        how = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, "device": device, "dtype": dtype}
        super().__init__(dim, num_heads, window_size, **how)
        self.shifted = shifted
        self.always_shift = always_shift

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        window, shift = cast("list[int]", self.window_size), [0, 0]
        if self.shifted:
            shift = [m // 2 for m in window]
            if not self.always_shift:
                # 1 - 1 // number of windows: 0 for one window, else 1, also for a size that is only a symbol
                axes = zip(shift, (h, w), window, strict=True)
                shift = [s * (1 - 1 // ceil_div(n, m)) for s, n, m in axes]
        table = resize_rel_pos(self.rpb, [2 * window[0] - 1, 2 * window[1] - 1], "bicubic")
        q, k, v = self._project(pad_to_multiple(x, window))
        x = window_attention(q, k, v, window_size=window, shift=shift, bias=table, scale=self.scale)
        x = fit(x.flatten(3), [h, w])  # [B, H, W, C]
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        shift = f"shifted={self.shifted}, always_shift={self.always_shift}"
        return f"num_heads={self.num_heads}, window_size={self.window_size}, {shift}"
