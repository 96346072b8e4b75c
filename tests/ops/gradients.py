"""Shared by the op tests: an op's result and the gradient of every tensor, in any dtype and memory layout."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tolerances
from tests.tolerances import finite, relative_error


def leaves(shapes, seed, dtype=torch.float64):
    """Random tensors of the given shapes; values do not depend on the dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def results_of(op, tensors, name):
    """What the op returns, one tensor or several, by names."""
    out = op(**tensors)
    return {f"{name} {i}": r for i, r in enumerate(out if isinstance(out, tuple) else (out,))}


def results_and_gradients(op, tensors, strided=False):
    """`op(**tensors)` and all gradients for fixed random cotangents.

    With `strided`, maps [B, *spatial, N, D] are given as slices of a wider tensor that lies heads before tokens.
    """
    inputs = {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
    views = {**tensors, **inputs}
    if strided:
        views |= {n: F.pad(t, (1, 2))[..., 1:-2] for n, t in inputs.items()}
        for n in {"q", "k", "v", "logits"} & views.keys():
            views[n] = views[n].transpose(1, -2).contiguous().transpose(1, -2)
    results = results_of(op, views, "result")
    cotangents = leaves({n: r.shape for n, r in results.items()}, 1)
    grads = torch.autograd.grad(
        list(results.values()), list(inputs.values()), [cotangents[n].to(r) for n, r in results.items()]
    )
    return {**results, **{f"grad {n}": g for n, g in zip(inputs, grads, strict=True)}}


def compare(op, reference, tensors, strided=False):
    """The op against the reference in float64 on the same (rounded) tensors; also without gradients."""
    dtype = next(iter(tensors.values())).dtype
    exact = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    expected = results_and_gradients(reference, exact, strided)
    got = results_and_gradients(op, tensors, strided)
    with torch.no_grad():
        got.update(results_of(op, tensors, "inference: result"))
    expected.update({f"inference: {n}": r for n, r in expected.items() if n.startswith("result")})
    assert got.keys() == expected.keys()
    largest = max(finite(value, value)[1].norm().item() for value in expected.values())
    for name, value in expected.items():
        is_lse = name.endswith("result 1")  # log-sum-exps come in float32 at least
        assert got[name].dtype == (torch.promote_types(dtype, torch.float32) if is_lse else dtype), name
        # Some gradients are zero but for rounding (a relative term that is the same for all keys): relative to the
        # largest one there.
        limit = tolerances.OP[dtype] * (tolerances.CANCELLING if name == "grad temperature" else 1)
        found, value = finite(got[name], value)
        assert (found - value).norm() <= limit * max(1, largest) or relative_error(found, value) <= limit, name


def check(op, problem, backend, dtype=torch.float64):
    """A backend of the op against its reference; a problem is (shapes, other arguments, strided, seed)."""
    shapes, call, strided, seed = problem
    run, reference = (partial(op, **call, backend=b) for b in (backend, "reference"))
    compare(run, reference, leaves(shapes, seed, dtype), strided)


def kept_bytes(op, **tensors):
    """Bytes of what the op keeps for its backward pass, and its result."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = op(**tensors)
    return sum(kept.values()), out


class Recorder(TorchDispatchMode):
    """Names of the operations that ran, and the size of the largest tensor that they made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out
