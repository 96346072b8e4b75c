"""The pre-norm transformer block on channels-last maps."""

import torch
from timm.layers import DropPath, LayerScale, Mlp, get_act_layer
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); layer scale and stochastic depth on both branches.

    Shapes: [..., dim] -> [..., dim], as far as `attn` keeps them.

    Args:
        dim: Channels.
        attn: Token mixer, called with the normalised input.
        mlp_ratio: Hidden width of the MLP over `dim`.
        proj_drop: Dropout after both linear layers of the MLP.
        drop_path: Probability of dropping a branch, per sample.
        layer_scale: Initial value of the per-channel scales; None leaves them out.
        act: Activation of the MLP, as in timm.
        eps: Of both norms.
        mlp: Takes the place of the MLP; `mlp_ratio`, `proj_drop` and `act` have no effect then.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        act: str = "gelu",
        eps: float = 1e-5,
        mlp: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1: nn.Module = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=eps, **dd)
        if mlp is None:
            mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=get_act_layer(act), drop=proj_drop, **dd)
        self.mlp = mlp
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TokenTransformerBlock(TransformerBlock):
    """`TransformerBlock` for tokens [B, P + H * W, dim] and the size [H, W] of their map, both given to `attn`."""

    # pyrefly: ignore[bad-override]: tokens come with the size of their map
    def forward(self, x: Tensor, size: list[int]) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
