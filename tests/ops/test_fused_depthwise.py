"""Dynamic depthwise convolutions in Triton: on a CPU in its interpreter."""

from functools import partial

import pytest
import torch

from tests import tolerances
from tests.ops.gradients import leaves, results_and_gradients
from tests.tolerances import relative_error
from visattn.ops import dynamic_depthwise_conv, explain
from visattn.ops.aggregated.reference import neighbours
from visattn.ops.fused.depthwise import dynamic_conv, mix_neighbours, mix_windows
from visattn.ops.geometry import Axis, neighbors, outer_index

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = pytest.mark.parametrize(
    ("dtype", "views"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True)],
    ids=["float32-plain", "float32-strided", "float16-strided"],
)


def on_device(tensors):
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def strided(x):
    """x as a slice of a tensor in which the map's axes are transposed."""
    return torch.cat([x, x], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[-1]]


def mix_reference(v, weights):
    kernel = round(weights.shape[-1] ** 0.5)
    return torch.einsum("bhwjnd,bhwnj->bhwnd", neighbours(v, kernel), weights)


def conv_reference(x, kernels):
    return dynamic_depthwise_conv(x, kernels, "reference")


def windows_reference(v, weights, kernel_size):
    index = outer_index(
        [neighbors(Axis(*axis)).index for axis in zip(v.shape[1:3], kernel_size, strict=True)], v.shape[1:3]
    )
    return torch.einsum("bsjnd,bsnj->bsnd", v.flatten(1, 2)[:, index], weights.flatten(1, 2)).view(v.shape)


MIX = {  # v and the neighbourhood's width
    "head dim 24": ((2, 9, 7, 3, 24), 3),
    "one head, wide": ((1, 5, 6, 1, 130), 3),
    "large neighbourhood": ((1, 2, 5, 2, 5), 7),
    "one neighbour": ((2, 3, 3, 2, 8), 1),
    "one position": ((2, 1, 1, 2, 8), 3),
    "one row, one channel": ((1, 1, 20, 2, 1), 5),
}
WINDOWS = {  # v and the window's size
    "head dim 24": ((2, 9, 7, 3, 24), (3, 3)),
    "several tiles": ((1, 23, 9, 1, 24), (5, 3)),
    "as large as the map": ((1, 3, 5, 2, 5), (3, 5)),
    "even, nearly the map": ((1, 3, 5, 1, 4), (2, 4)),
    "many taps": ((1, 9, 7, 2, 3), (7, 5)),
    "one tap": ((2, 3, 3, 2, 8), (1, 1)),
}
CONV = {  # x and the kernels' width
    "several sums": ((1, 17, 17, 24), 3),
    "several blocks of channels": ((1, 5, 6, 150), 3),
    "large kernel": ((1, 5, 2, 7), 7),
    "one tap": ((2, 3, 3, 8), 1),
    "one position": ((2, 1, 1, 8), 3),
    "one column": ((1, 20, 1, 3), 5),
}


def problem(op, size, kernel, dtype=torch.float32):
    weights = (size[0], size[3], kernel**2) if op is dynamic_conv else (*size[:4], kernel**2)
    return on_device(leaves({"x": size, "weights": weights}, 0, dtype))


def definition_of(op):
    found = {mix_neighbours: mix_reference, dynamic_conv: conv_reference}
    return found.get(op) or partial(windows_reference, **op.keywords)


def check(op, tensors, views=False):
    definition = definition_of(op)
    expected = results_and_gradients(
        lambda x, weights: definition(x, weights), {n: t.double() for n, t in tensors.items()}
    )
    got = results_and_gradients(lambda **t: op(*map(strided, t.values()) if views else t.values()), tensors)
    for part, value in expected.items():
        assert got[part].dtype == tensors["weights" if "weights" in part else "x"].dtype, part
        assert relative_error(got[part], value) <= tolerances.OP[tensors["x"].dtype], part


@pytest.mark.parametrize(("size", "kernel"), MIX.values(), ids=MIX)
@FORMS
def test_mix_matches_its_definition(size, kernel, views, dtype, poisoned_empty):
    check(mix_neighbours, problem(mix_neighbours, size, kernel, dtype), views)


@pytest.mark.parametrize(("size", "kernel"), WINDOWS.values(), ids=WINDOWS)
@FORMS
def test_windows_match_their_definition(size, kernel, views, dtype, poisoned_empty):
    weights = (*size[:4], kernel[0] * kernel[1])
    tensors = on_device(leaves({"x": size, "weights": weights}, 0, dtype))
    check(partial(mix_windows, kernel_size=kernel), tensors, views)


@pytest.mark.parametrize(("size", "kernel"), CONV.values(), ids=CONV)
@FORMS
def test_convolution_matches_its_definition(size, kernel, views, dtype, poisoned_empty):
    check(dynamic_conv, problem(dynamic_conv, size, kernel, dtype), views)


@pytest.mark.parametrize(("op", "size"), [(mix_neighbours, (2, 7, 5, 3, 24)), (dynamic_conv, (2, 7, 5, 24))])
def test_bfloat16(op, size, poisoned_empty):
    check(op, problem(op, size, 3, torch.bfloat16))


def test_mix_with_weights_of_float32(poisoned_empty):
    """What TransNeXt's learnable tokens add to softmax weights may be kept in float32."""
    tensors = problem(mix_neighbours, (2, 5, 6, 2, 24), 3, torch.float16)
    tensors["weights"] = tensors["weights"].float()
    check(mix_neighbours, tensors)


THREE = partial(mix_windows, kernel_size=(3, 3))


@pytest.mark.parametrize(
    ("op", "size"), [(mix_neighbours, (1, 4, 3, 2, 5)), (THREE, (1, 4, 3, 2, 5)), (dynamic_conv, (2, 4, 3, 5))]
)
def test_second_derivatives(op, size):
    """Not by gradcheck, which wants float64: against those of the definition."""
    tensors = problem(op, size, 3)

    def second(run, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in tensors.values()]
        grads = torch.autograd.grad(run(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for got, expected in zip(second(op, torch.float32), second(definition_of(op), torch.float64), strict=True):
        assert relative_error(got, expected) <= 2 * tolerances.OP[torch.float32]


@pytest.mark.parametrize(
    ("op", "size"), [(mix_neighbours, (2, 9, 9, 2, 8)), (THREE, (2, 9, 9, 2, 8)), (dynamic_conv, (1, 17, 17, 24))]
)
def test_results_repeat_bit_by_bit(op, size):
    tensors = problem(op, size, 3)
    runs = [results_and_gradients(lambda **t: op(*t.values()), tensors) for _ in range(3)]
    for part, value in runs[0].items():
        assert all(torch.equal(run[part], value) for run in runs[1:]), part


@pytest.mark.parametrize(
    ("op", "size"), [(mix_neighbours, (2, 5, 6, 2, 8)), (THREE, (2, 5, 6, 2, 8)), (dynamic_conv, (2, 5, 6, 8))]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(op, size, transposed):
    x, weights = problem(op, size, 3).values()
    if op is dynamic_conv:
        x, weights = x[:, :, :, None], weights[:, None]
    torch.library.opcheck(torch.ops.visattn.depthwise.default, (x, weights, transposed, [3, 3], op is THREE))
    torch.library.opcheck(
        torch.ops.visattn.depthwise_weights.default,
        (x, x, [3, 3], op is THREE, op is dynamic_conv, torch.float16 if transposed else x.dtype),
    )


def test_choice_of_backend():
    x, kernels = problem(dynamic_conv, (1, 5, 6, 8), 3).values()
    with explain() as decisions:
        dynamic_depthwise_conv(x, kernels)
        dynamic_depthwise_conv(x, kernels, backend="triton")
    assert [d.backend for d in decisions] == ["triton" if DEVICE == "cuda" else "eager", "triton"]


@pytest.mark.parametrize(
    ("op", "shapes", "message"),
    [
        (mix_neighbours, [(1, 4, 3, 2, 5), (1, 4, 3, 1, 9)], r"weights \[B, H, W, N, K \* K\].*\(1, 4, 3, 1, 9\)"),
        (mix_neighbours, [(1, 4, 3, 5), (1, 4, 3, 9)], r"expected v \[B, H, W, N, Dv\]"),
        (mix_neighbours, [(1, 4, 3, 2, 5), (1, 4, 3, 2, 8)], r"K \* K weights of a neighbourhood with an odd K, got 8"),
        (dynamic_conv, [(1, 4, 3, 5), (1, 5, 4)], r"with an odd K, got 4"),
        (dynamic_conv, [(1, 4, 3, 5), (1, 4, 9)], r"kernels \[B, C, K \* K\].*\(1, 4, 9\)"),
    ],
)
def test_mistakes_are_named(op, shapes, message):
    with pytest.raises(ValueError, match=message):
        op(*map(torch.zeros, shapes))
