"""Neighborhood mix: given weights of every token's neighbours, applied to values. See README.md in this folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.dispatch import Backends, Problem
from visattn.ops.fused import support
from visattn.ops.geometry import Axis, is_symbolic, plain
from visattn.ops.mix import eager, reference, triton
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class MixProblem(Problem):
    """logits [B, H, W, N, K_h * K_w], v [B, H, W, N, C], bias [N, 2 * K_h - 1, 2 * K_w - 1]."""

    logits: Tensor
    v: Tensor
    kernel_size: Sequence[int]
    bias: Tensor | None

    def __post_init__(self) -> None:
        logits, v, kernel = self.logits, self.v, self.kernel_size
        if min(kernel) < 1:
            raise ValueError(f"expected kernel_size >= 1 on both axes, got {list(kernel)}")
        lead, taps = v.shape[:4], math.prod(kernel)
        if v.ndim != 5 or tuple(logits.shape) != (*lead, taps):
            expected = f"v [B, H, W, N, C] and logits [B, H, W, N, {taps}]"
            raise ValueError(f"expected {expected}, got {checks.shapes(v=v, logits=logits)}")
        if not v.dtype.is_floating_point or logits.dtype != v.dtype:
            dtypes = [logits.dtype, v.dtype]
            raise TypeError(f"expected logits and v of one floating dtype, got {dtypes}")
        for k, n in zip(kernel, self.size, strict=True):
            if not is_symbolic(n) and k > n:
                raise ValueError(
                    f"expected kernel_size <= size on every axis, got kernel_size {list(kernel)} on a map of "
                    f"{tuple(self.size)}; try to resize the map before making logits and v"
                )
        checks.check_table(v, self.bias, kernel)

    @property
    def size(self) -> list[int]:
        """H and W."""
        return plain(self.v.shape[1:3])

    @property
    def axes(self) -> tuple[Axis, ...]:
        """How windows lie on each axis."""
        return tuple(Axis(n, k) for n, k in zip(self.size, self.kernel_size, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """In which weights are made: float32 at least."""
        return torch.promote_types(self.v.dtype, torch.float32)

    def empty(self) -> Tensor:
        return self.v.new_empty(self.v.shape)

    def flops(self) -> int:
        """Those of the weighted sum."""
        return 2 * self.logits.numel() * self.v.shape[-1]


_backends = Backends(
    "neighborhood_mix",
    MixProblem,
    triton.attend,
    eager.attend,
    reference.attend,
    can_run=support.can_run_tensors,
    whole_on_cpu=True,
)


@traced_as_one
def neighborhood_mix(
    logits: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """out[p] = sum_j softmax_j(logits[p, j] + bias[displacement(p, j)]) v[j-th token of p's window].

    The window is that of `neighborhood_attention`: centred on the token, shifted (never cut) at the border, so that it
    always has `kernel_size` tokens per axis; an even window leans to the left. Differentiable in every tensor.

    Args:
        logits: [B, H, W, N, K * K], of N heads; the tokens of a window (taps) row by row. Any strides.
        v: Values [B, H, W, N, C]. Any strides.
        kernel_size: Tokens of a window per axis, K or (rows, columns); from 1 to the axis.
        bias: Relative position table [N, 2 K - 1, 2 K - 1]; entry K - 1 is displacement 0 (tap - token).
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, C] of v's dtype; under autocast of its dtype, to which logits and v are cast.

    Raises:
        ValueError: Shapes that do not fit, or a window larger than the map.
        TypeError: logits and v of different dtypes, or tensors that are not floating point.
        BackendError: The requested backend cannot run this call.

    Source: ContMix of OverLoCK (arXiv:2502.20087), section 3.3.
    """
    checks.check_tensors(logits=logits, v=v)
    logits, v = to_autocast(logits, v)
    problem = MixProblem(logits, v, checks.per_axis("kernel_size", kernel_size, int, 2), bias)
    with without_autocast(v.device):
        return _backends.choose(problem, backend)(problem)
