"""CoAtNet's transformer block on maps [B, C, H, W], and a position bias computed from displacements."""

from collections.abc import Callable

import torch
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from visattn.layers.block import TransformerBlock


class LogRelPos(nn.Module):
    """Position bias as an MLP of the displacement on a logarithmic scale: map [B, H, W, C] -> table [N, 2H-1, 2W-1].

    It depends on the displacement alone, so that the same weights serve maps of every size.

    Args:
        num_heads: Heads.
        hidden_dim: Hidden width of the MLP.

    Source: timm's RelPosMlp of mode "cr" (Apache-2.0), after Swin V2 (arXiv:2111.09883).
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        how = {"act_layer": nn.ReLU, "drop": (0.125, 0.0), "device": device, "dtype": dtype}
        self.mlp = Mlp(2, hidden_dim, num_heads, **how)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        # The table runs from -n + 1 to n - 1, key from query; the MLP takes query from key. (arange cannot be traced.)
        rows = h - x.new_ones([2 * h - 1, 2 * w - 1], dtype=torch.int64).cumsum(0)
        columns = w - x.new_ones([2 * h - 1, 2 * w - 1], dtype=torch.int64).cumsum(1)
        displacement = torch.stack([rows, columns], dim=-1).to(torch.float32)
        displacement = displacement.sign() * displacement.abs().log1p()
        return self.mlp(displacement.to(x.dtype)).permute(2, 0, 1)  # [N, 2H - 1, 2W - 1]


class PooledTransformerBlock(TransformerBlock):
    """proj(pool(x)) + attn(pool(norm(x))), then x + mlp(norm(x)): [B, dim, H, W] -> [B, out_dim, H', W'].

    Without pooling, and with equal widths, this is `TransformerBlock` on another layout. Maps that are channels-last in
    memory stay so, and are never copied.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output; a linear layer is in the shortcut where they differ from `dim`.
        attn: Token mixer [B, H, W, dim] -> [B, H, W, out_dim].
        pool: Pooling of maps [B, C, H, W], on both branches; None leaves it out.
        shortcut_bias: Bias of the linear layer.
        mlp_ratio: Hidden width of the MLP over `out_dim`.
        proj_drop: Dropout after both linear layers of the MLP.
        drop_path: Probability of dropping a branch, per sample.
        layer_scale: Initial value of the per-channel scales; None leaves them out.
        norm_layer: Builds the norm of maps [B, C, H, W] from their width.

    Source: CoAtNet (arXiv:2106.04803, appendix A.1).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        attn: nn.Module,
        pool: nn.Module | None = None,
        shortcut_bias: bool = True,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: Callable[..., nn.Module] = LayerNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(out_dim, attn, mlp_ratio, proj_drop, drop_path, layer_scale, **dd)
        self.pool = nn.Identity() if pool is None else pool
        self.shortcut = nn.Identity()
        if dim != out_dim:
            self.shortcut = nn.Linear(dim, out_dim, bias=shortcut_bias, **dd)
        self.norm1 = norm_layer(dim, **dd)
        self.norm2 = norm_layer(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.norm1(x)).permute(0, 2, 3, 1)  # [B, H', W', dim]
        x = self.shortcut(self.pool(x).permute(0, 2, 3, 1))  # [B, H', W', out_dim]
        x = x + self.drop_path1(self.ls1(self.attn(y)))
        y = self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H', W', out_dim]
        x = x + self.drop_path2(self.ls2(self.mlp(y)))
        return x.permute(0, 3, 1, 2)  # [B, out_dim, H', W']
