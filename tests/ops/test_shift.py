"""Shift: the official golden, and zeros and slices written out, for every size, layout and gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.golden import GOLDEN
from visattn import ops


def by_definition(x, channels, step):
    """As the paper writes it: into zeros, one direction after another."""
    out, (h, w), c = torch.zeros_like(x), x.shape[1:3], channels
    out[:, :, : max(0, w - step), :c] = x[:, :, step:, :c]
    out[:, :, step:, c : 2 * c] = x[:, :, : max(0, w - step), c : 2 * c]
    out[:, : max(0, h - step), :, 2 * c : 3 * c] = x[:, step:, :, 2 * c : 3 * c]
    out[:, step:, :, 3 * c : 4 * c] = x[:, : max(0, h - step), :, 3 * c : 4 * c]
    out[..., 4 * c :] = x[..., 4 * c :]
    return out


LAYOUTS = {
    "plain": lambda x: x,
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slices": lambda x: torch.stack([x, -x], -2).flatten(3)[..., : x.shape[-1]],
    "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
    "one value": lambda x: x[:1, :1, :1].expand(x.shape) if len(x) else x,
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30)),
    part=st.integers(4, 16),
    step=st.sampled_from([1, 1, 1, 0, 2, 4, 10]),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_is_its_definition(size, part, step, layout, dtype, seed):
    """Bit for bit, with its gradient, in any memory layout; where C is not divisible, groups are rounded down."""
    generator = torch.Generator().manual_seed(seed)
    source, cotangent = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    x, channels = LAYOUTS[layout](source), size[-1] // part
    got, expected = ops.shift(x, channels, step), by_definition(x, channels, step)
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    grads = (torch.autograd.grad(out, source, cotangent, create_graph=True)[0] for out in (got, expected))
    assert torch.equal(*grads)


def test_golden():
    golden = {
        n: torch.from_numpy(a) for n, a in np.load(GOLDEN / "op_shift.npz").items() if n not in ("layout", "note")
    }
    x, out, cotangent, grad = (golden[n].permute(0, 2, 3, 1) for n in ("x", "out", "grad_out", "grad_x"))
    x.requires_grad_()
    got = ops.shift(x, x.shape[-1] // golden["n_div"].item())
    assert torch.equal(got, out)
    assert torch.equal(torch.autograd.grad(got, x, cotangent)[0], grad)


def test_nothing_is_kept_for_the_backward_pass_and_only_the_result_is_as_large_as_the_map():
    x = torch.randn(1, 32, 32, 48, requires_grad=True)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        ops.shift(x, 4)
    assert not kept
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated <= 1.5 * x.nbytes


@pytest.mark.parametrize(
    ("shape", "channels", "step"), [((4, 4, 8), 1, 1), ((1, 4, 4, 8), 3, 1), ((1, 4, 4, 8), 1, -1)]
)
def test_arguments_that_do_not_fit(shape, channels, step):
    with pytest.raises(ValueError, match=r"expected a map \[B, H, W, C\], channels of 0 to C // 4 .* try channels of"):
        ops.shift(torch.randn(shape), channels, step)


def test_arguments_of_another_type():
    with pytest.raises(TypeError, match="expected x to be a tensor, got list"):
        ops.shift([[1.0]], 1)
    for name, args in (("channels", (1.0,)), ("channels", (None,)), ("step", (1, "2"))):
        with pytest.raises(ValueError, match=f"expected {name} of one int, got"):
            ops.shift(torch.randn(1, 4, 4, 8), *args)
