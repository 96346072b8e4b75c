"""Self-attention within windows or grids over `visattn.ops.window_attention`, channels-last."""

import torch
from timm.layers import to_2tuple
from torch import Tensor

from visattn.layers.attention import MultiHeadAttention
from visattn.ops import resize_rel_pos, window_attention
from visattn.ops.geometry import ceil_div

torch.fx.wrap("resize_rel_pos")
torch.fx.wrap("window_attention")


class WindowAttention(MultiHeadAttention):
    """Multi-head attention among the tokens of a window, or of a grid that spans the map, on maps of any size.

    Windows that the map does not fill are attended as they are, without padding tokens. The relative position table
    `rpb` [N, 2 * table_size - 1 per axis] is resized (bilinear) to the window in use on every call, so that the window
    may change at any time and the parameter stays.

    Shapes: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: Channels.
        num_heads: Heads.
        window_size: Tokens per axis of a window, or of the grid. None: what `num_windows` windows per axis need to
            cover the map, ceil(size / num_windows), so that they grow with it.
        num_windows: Windows per axis where `window_size` is None.
        table_size: Window that the table is learned for; default `window_size`.
        grid: MaxViT's grid attention: tokens at equal distances over the map instead of neighbours.
        scale: Factor of q k^T; default head width ** -0.5.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.
        rel_pos: Learn the table; False: attention without position.

    Raises:
        ValueError: Heads that do not divide the channels, sizes below 1, or neither window nor table size.

    Sources: MaxViT (arXiv:2204.01697, section 3.2), google-research/maxvit (Apache-2.0) for the resize.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int] | None = 7,
        num_windows: int | tuple[int, int] = 1,
        table_size: int | tuple[int, int] | None = None,
        grid: bool = False,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        rel_pos: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = None if window_size is None else _checked("window_size", window_size)
        sizes = sizes if table_size is None else _checked("table_size", table_size)
        if sizes is None:
            expected = "table_size where window_size is None"
            raise ValueError(f"expected {expected}, got neither; try table_size=7")
        table, dd = tuple(2 * n - 1 for n in sizes), {"device": device, "dtype": dtype}
        table = table if rel_pos else None
        super().__init__(dim, num_heads, qkv_bias, proj_drop, table, **dd)
        self.grid = grid
        self.scale = scale
        self.num_windows = _checked("num_windows", num_windows)
        self.set_window_size(window_size)

    def set_window_size(self, window_size: int | tuple[int, int] | None) -> None:
        """Attend in other windows from now on; None: in windows that grow with the map. No parameter changes."""
        self.window_size = None if window_size is None else _checked("window_size", window_size)

    def _table(self, window: list[int], resize: str) -> Tensor | None:
        if self.rpb is None:
            return None
        return resize_rel_pos(self.rpb, [2 * window[0] - 1, 2 * window[1] - 1], resize)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        window = self.window_size
        if window is None:
            axes = zip((h, w), self.num_windows, strict=True)
            window = [ceil_div(n, windows) for n, windows in axes]
        table = self._table(window, "bilinear")
        q, k, v = self._project(x)
        how = {"grid": self.grid, "bias": table, "scale": self.scale}
        x = window_attention(q, k, v, window_size=window, **how)
        return self.proj_drop(self.proj(x.flatten(3)))  # [B, H, W, C]

    def extra_repr(self) -> str:
        window = f"window_size={self.window_size}"
        if self.window_size is None:
            window = f"num_windows={self.num_windows}"
        return f"num_heads={self.num_heads}, {window}, grid={self.grid}"


def _checked(name: str, value: int | tuple[int, int]) -> list[int]:
    sizes = list(to_2tuple(value))
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"expected {name} of one int or two, at least 1, got {value}")
    return sizes
