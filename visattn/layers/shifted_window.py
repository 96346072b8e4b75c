"""Swin's attention within windows, shifted by half a window in every other block, on maps of any size."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.layers.window import WindowAttention
from visattn.ops import fit, pad_to_multiple, window_attention
from visattn.ops.geometry import ceil_div

torch.fx.wrap("fit")
torch.fx.wrap("pad_to_multiple")
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
        rel_pos: Learn the table; False: attention without position.

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
        rel_pos: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        how = {"qkv_bias": qkv_bias, "proj_drop": proj_drop, "rel_pos": rel_pos}
        super().__init__(dim, num_heads, window_size, **how, device=device, dtype=dtype)
        self.shifted = shifted
        self.always_shift = always_shift

    def _tiling(self, size: list[int]) -> tuple[list[int], list[int]]:
        """Tokens per axis of a window, and the shift, on a map of this size."""
        window = cast("list[int]", self.window_size)
        if not self.shifted:
            return window, [0, 0]
        shift = [m // 2 for m in window]
        if not self.always_shift:
            # 1 - 1 // number of windows: 0 for one window, else 1, also for a size that is only a symbol
            axes = zip(shift, size, window, strict=True)
            shift = [s * (1 - 1 // ceil_div(n, m)) for s, n, m in axes]
        return window, shift

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        window, shift = self._tiling([h, w])
        how = {"bias": self._table(window, "bicubic"), "scale": self.scale}
        q, k, v = self._project(pad_to_multiple(x, window))
        x = window_attention(q, k, v, window_size=window, shift=shift, **how)
        x = fit(x.flatten(3), [h, w])  # [B, H, W, C]
        return self.proj_drop(self.proj(x))

    def attended(self, x: Tensor) -> dict[str, Tensor]:
        """The softmax weights of every query, for the same input as `forward`.

        Args:
            x: Map [B, H, W, dim].

        Returns:
            "window" [B, H, W, N, M], those of the M tokens of the query's window, row by row, padding tokens among
            them. They sum to 1; what a shift takes from a window has weight 0.
        """
        _, h, w, _ = x.shape
        window, shift = self._tiling([h, w])
        how = {"bias": self._table(window, "bicubic"), "scale": self.scale}
        q, k, _ = self._project(pad_to_multiple(x, window))
        axes = zip(q.shape[1:3], shift, window, strict=True)
        rows, columns = ((torch.arange(n, device=x.device) - s) % m for n, s, m in axes)
        place = rows[:, None] * window[1] + columns  # [H', W'], of a token in its window
        values = F.one_hot(place, window[0] * window[1]).to(q.dtype)  # [H', W', M]
        values = values[None, :, :, None].expand(*q.shape[:-1], -1)  # [B, H', W', N, M]
        weights = window_attention(q, k, values, window_size=window, shift=shift, **how)
        # [B, H, W, N, M]
        return {"window": fit(weights.flatten(3), [h, w]).unflatten(3, [self.num_heads, -1])}

    def extra_repr(self) -> str:
        shift = f"shifted={self.shifted}, always_shift={self.always_shift}"
        return f"num_heads={self.num_heads}, window_size={self.window_size}, {shift}"
