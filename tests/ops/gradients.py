"""Shared by the op tests: an op's result and the gradient of every tensor, in any dtype and memory layout."""

import torch
import torch.nn.functional as F

from tests import tolerances
from tests.tolerances import relative_error


def leaves(shapes, seed, dtype=torch.float64):
    """Random tensors of the given shapes; values do not depend on the dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def result_and_gradients(op, tensors, strided=False):
    """`op(**tensors)` and all gradients for a fixed random cotangent.

    With `strided`, maps [B, *spatial, N, D] are given as slices of a wider tensor that lies heads before tokens.
    """
    inputs = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    views = dict(inputs)
    if strided:
        views = {n: F.pad(t, (1, 2))[..., 1:-2] for n, t in inputs.items()}
        for n in ("q", "k", "v"):
            views[n] = views[n].transpose(1, -2).contiguous().transpose(1, -2)
    out = op(**views)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    names = list(inputs)
    grads = torch.autograd.grad(out, [inputs[n] for n in names], cotangent)
    return {"result": out.detach(), **{f"grad {n}": g for n, g in zip(names, grads, strict=True)}}


def compare(op, reference, tensors, strided=False):
    """The op against the reference in float64 on the same (rounded) tensors; also without gradients."""
    dtype = next(iter(tensors.values())).dtype
    expected = result_and_gradients(reference, {n: t.double() for n, t in tensors.items()}, strided)
    got = result_and_gradients(op, tensors, strided)
    with torch.no_grad():
        got["result in inference"] = op(**tensors)
    expected["result in inference"] = expected["result"]
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == dtype, name
        # Some gradients are zero but for rounding (a relative term that is the same for all keys): absolute there.
        close = (got[name].double() - value).norm() <= tolerances.OP[dtype]
        assert close or relative_error(got[name], value) <= tolerances.OP[dtype], name
