"""The one table of tolerances: norm-wise relative errors, `||a - b|| / ||b||`."""

import torch
from torch import Tensor

# Two implementations of an op that compute in the same dtype (float64: rounding only).
OP = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Times these: gradients in which almost all of very many terms cancel.
CANCELLING = 10
# Goldens of ops were computed in float64 and stored as float32.
OP_GOLDEN_FORWARD = 2e-6
OP_GOLDEN_GRADIENT = 1e-5
# Models against the official code, float32.
MODEL_GOLDEN = 1e-5
# The same float32 model run another way (scripted, compiled, exported, checkpointed).
SAME_MODEL = 1e-5


def finite(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, zero where they are infinite alike: a difference of infinities is NaN."""
    got, expected = got.detach().double(), expected.detach().double()
    alike = expected.isinf() & (got == expected) if got.shape == expected.shape else torch.tensor(False)
    return got.masked_fill(alike, 0), expected.masked_fill(alike, 0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error in float64; NaN anywhere gives NaN, which fails every comparison."""
    got, expected = finite(got, expected)
    if got.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    scale = expected.norm()
    return ((got - expected).norm() / (scale if scale > 0 else 1)).item()
