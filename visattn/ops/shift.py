"""Shift of channels by pixels, the mixing of tokens in ShiftViT."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import checks
from visattn.ops.registration import custom_op


def _empty(x: Tensor, channels: int, step: int = 1) -> Tensor:
    return x.new_empty(x.shape)


@custom_op(fake=_empty)
def shift(x: Tensor, channels: int, step: int = 1) -> Tensor:
    """Move four groups of channels of a map [B, H, W, C] by `step` pixels each; zeros enter at the border.

    The first `channels` move left (out[:, :, w] = x[:, :, w + step]), as many each right, up and down; the others stay.

    Args:
        x: The map.
        channels: Of a group; the official code has C // 12 or C // 16.
        step: Pixels.

    Raises:
        ValueError: No map, or groups that it has no channels for.

    Source: ShiftViT (arXiv:2201.10801), section 3.
    """
    checks.check_tensors(x=x)
    channels, step = checks.one_int("channels", channels), checks.one_int("step", step)
    if x.ndim != 4 or not 0 <= 4 * channels <= x.shape[-1] or step < 0:
        got = f"{tuple(x.shape)}, {channels} and {step}"
        expected = "a map [B, H, W, C], channels of 0 to C // 4 and a step of 0 or more"
        raise ValueError(f"expected {expected}, got {got}; try channels of C // 12")
    left, right, up, down, rest = x.split([channels] * 4 + [x.shape[-1] - 4 * channels], -1)
    h, w = x.shape[1:3]
    # Zeros first and slices then, so that a step may be larger than the map.
    left = F.pad(left, (0, 0, 0, step)).narrow(2, step, w)  # [B, H, W, channels]
    right = F.pad(right, (0, 0, step, 0)).narrow(2, 0, w)  # [B, H, W, channels]
    up = F.pad(up, (0, 0, 0, 0, 0, step)).narrow(1, step, h)  # [B, H, W, channels]
    down = F.pad(down, (0, 0, 0, 0, step, 0)).narrow(1, 0, h)  # [B, H, W, channels]
    return torch.cat([left, right, up, down, rest], -1)  # [B, H, W, C]
