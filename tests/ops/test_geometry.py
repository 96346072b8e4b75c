"""Geometry against the definition, written as plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.ops.geometry import Axis, neighbors, sees_all, tile_sizes, tiles


def visible_keys(i: int, axis: Axis) -> list[int]:
    """The keys of query i, from the definition in the papers."""
    k, d, s = axis.kernel_size, axis.dilation, axis.stride
    members = [j for j in range(axis.length) if j % d == i % d]
    p = members.index(i)
    block = [r for r in range(len(members)) if r // s == p // s]
    if axis.is_causal:
        leader = min(p // s * s + s - 1, len(members) - 1)
        return [members[r] for r in range(max(leader - k + 1, 0), p + 1)]
    leader = min(block[0] + s // 2, len(members) - 1)
    left = leader - k // 2
    left -= max(left + k - len(members), 0)
    left = max(left, 0)
    return members[left : left + k]


@st.composite
def axes(draw):
    kernel = draw(st.integers(1, 13))
    dilation = draw(st.integers(1, 5))
    length = draw(st.integers(kernel * dilation, kernel * dilation + 40))
    return Axis(length, kernel, dilation, draw(st.integers(1, kernel)), draw(st.booleans()))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(axes())
def test_neighbors_are_the_definition(axis):
    found = neighbors(axis)
    for i in range(axis.length):
        keys = found.index[i][found.visible[i]].tolist()
        assert keys == visible_keys(i, axis)
        assert found.displacement[i][found.visible[i]].tolist() == [
            (j - i) // axis.dilation + axis.kernel_size - 1 for j in keys
        ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(axes(), st.sampled_from([4, 8, 64]))
def test_tiles_hold_every_window(axis, tile):
    cut = tiles(axis, tile)
    t, u = tile_sizes(axis, tile)
    assert cut.query_index().shape[1] == t
    assert cut.key_index().shape[1] == u
    assert cut.query_index().flatten()[cut.slot].tolist() == list(range(axis.length))
    for i, slot in enumerate(cut.slot.tolist()):
        number, rank = divmod(slot, t)
        visible = cut.visible()[number, rank]
        keys = cut.key_index()[number][visible].tolist()
        assert keys == visible_keys(i, axis)
        if axis.stride == 1 and not axis.is_causal:
            expected = [(j - i) // axis.dilation + axis.kernel_size - 1 for j in keys]
            assert cut.displacement()[number, rank][visible].tolist() == expected
    assert cut.visible().any(-1).all(), "a query without keys would be NaN"
    if sees_all(axis, tile):
        assert cut.visible().all()


@pytest.mark.parametrize(
    ("axis", "tile", "expected"),
    [
        (Axis(56, 7), 8, (8, 14)),
        (Axis(56, 7, dilation=2), 8, (7, 13)),  # 28 is cut evenly
        (Axis(56, 7, dilation=8), 8, (7, 7)),  # the whole group, nothing hidden
        (Axis(14, 7), 8, (14, 14)),
        (Axis(56, 7, stride=7), 8, (7, 7)),  # blocked attention
    ],
)
def test_tile_sizes(axis, tile, expected):
    assert tile_sizes(axis, tile) == expected


def test_no_mask_for_dilated_and_blocked_windows():
    assert sees_all(Axis(56, 7, dilation=8), 8)
    assert sees_all(Axis(56, 7, stride=7), 8)
    assert not sees_all(Axis(57, 7, dilation=8), 8)
    assert not sees_all(Axis(7, 7, is_causal=True), 8)


def test_device_is_respected():
    assert neighbors(Axis(9, 3), "meta").index.device == torch.device("meta")
    assert tiles(Axis(9, 3), 8, "meta").slot.device == torch.device("meta")
