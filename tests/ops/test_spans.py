"""Intervals and tiles of the fused kernels against the definition of every relation, pair by pair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_geometry import axes as sliding_axes
from visattn.ops.geometry import (
    NONE,
    OUTSIDE,
    Axis,
    Clipped,
    Halo,
    Partition,
    Whole,
    neighbors,
    padded_rows,
    relation,
    tile_plan,
)

thorough = settings(max_examples=400, deadline=None, derandomize=True)


@st.composite
def partitions(draw):
    window = draw(st.integers(1, 9))
    is_grid = draw(st.booleans())
    return Partition(draw(st.integers(1, 40)), window, 0 if is_grid else draw(st.integers(0, window - 1)), is_grid)


@st.composite
def halos(draw):
    stride = draw(st.integers(1, 3))
    return Halo(draw(st.integers(1, 40)), stride * draw(st.integers(1, 5)), draw(st.integers(0, 4)), stride)


@st.composite
def clipped(draw):
    return Clipped(draw(st.integers(1, 40)), 2 * draw(st.integers(0, 4)) + 1)


def any_axis():
    whole = st.builds(Whole, st.integers(1, 40), st.integers(1, 40))
    return st.one_of(sliding_axes(), partitions(), halos(), whole, clipped())


def sizes(axis):
    """How many queries and keys."""
    if isinstance(axis, Whole):
        return axis.queries, axis.keys
    return getattr(axis, "queries", axis.length), axis.length


def definition(axis):
    """[queries, keys] the entry of a position table for every pair that sees each other, -1 for all others."""
    found = torch.full(sizes(axis), -1)
    query, key = (torch.arange(n) for n in found.shape)
    if isinstance(axis, Axis):
        near = neighbors(axis)
        rows = query[:, None].expand_as(near.index)
        found[rows[near.visible], near.index[near.visible]] = near.displacement[near.visible]
    elif isinstance(axis, Partition):
        window, rank = axis.place()
        same = window[:, None] == window
        found = torch.where(same, rank - rank[:, None] + axis.window - 1, -1)
    elif isinstance(axis, Halo):
        keys = axis.key_index()[query // axis.queries_per_block]
        inside = (keys >= 0) & (keys < axis.length)
        found[query[:, None].expand_as(keys)[inside], keys[inside]] = 0
    elif isinstance(axis, Clipped):
        reach = axis.kernel_size // 2
        distance = key - query[:, None]
        found = torch.where(distance.abs() <= reach, distance + reach, -1)
    else:
        found[:] = 0
    return found


def outside(axis):
    """[queries] how many places outside the map a query sees: those of its window that hold no token."""
    if isinstance(axis, Halo):
        keys = axis.key_index()[torch.arange(axis.queries) // axis.queries_per_block]
        return ((keys < 0) | (keys >= axis.length)).sum(1)
    if isinstance(axis, Partition):
        return (~axis.occupied()).sum(1)[axis.place()[0]]
    return torch.zeros(sizes(axis)[0], dtype=torch.long)


def pairs(query, key, entry, shape):
    """[queries, keys] the entries of the pairs of tokens that see each other; each may be there only once."""
    real = (query >= 0) & (key >= 0) & (entry >= 0)
    assert not (real & ((query >= shape[0]) | (key >= shape[1]))).any()
    number = (query * shape[1] + key)[real]
    assert len(number.unique()) == len(number), "a pair lies in two places"
    found = torch.full(shape, -1)
    found.view(-1)[number] = entry[real]
    return found


def seen(relation):
    """[groups, queries, keys] whether a position sees another."""
    place = torch.arange(relation.key.shape[1])
    return (place >= relation.start[..., None]) & (place < relation.stop[..., None])


def relation_pairs(relation, shape):
    visible = seen(relation)
    query, key = relation.query[..., None].expand_as(visible), relation.key[:, None].expand_as(visible)
    entry = torch.zeros_like(query)
    if relation.entries > 1:
        distance = torch.arange(visible.shape[2]) - torch.arange(visible.shape[1])[:, None]
        entry = (relation.sign * distance + relation.offset).expand_as(visible)
        used = entry[visible & (query >= 0) & (key >= 0)]
        assert ((used >= 0) & (used < relation.entries)).all()
    return pairs(query, key, entry.masked_fill(~visible, -1), shape)


def cut_pairs(cut, shape):
    entry = cut.pattern[cut.kind]
    return pairs(cut.query[..., None].expand_as(entry), cut.key[:, None].expand_as(entry), entry, shape)


@thorough
@given(any_axis())
def test_spans_are_the_definition(axis):
    relation = axis.spans()
    assert torch.equal(relation_pairs(relation, sizes(axis)), definition(axis))
    reach = {Axis: "kernel_size", Partition: "window"}.get(type(axis))
    assert relation.entries == (2 * getattr(axis, reach) - 1 if reach else getattr(axis, "kernel_size", 1))
    for tokens, number in zip((relation.query, relation.key), sizes(axis), strict=True):
        assert tokens[tokens >= 0].sort().values.tolist() == list(range(number))
        assert (tokens[tokens < 0] == OUTSIDE).all()
    for edge in (relation.start, relation.stop):
        assert (edge.diff(dim=1) >= 0).all()
    empty = (seen(relation) & (relation.key == OUTSIDE)[:, None]).sum(-1)[relation.query >= 0]
    order = relation.query[relation.query >= 0].sort().indices
    assert torch.equal(empty[order], outside(axis))


@thorough
@given(any_axis())
def test_reversed_is_the_transpose(axis):
    relation = axis.spans()
    turned = relation.reversed()
    assert torch.equal(seen(turned), seen(relation).mT)
    assert torch.equal(relation_pairs(turned, sizes(axis)[::-1]), definition(axis).T)
    again = turned.reversed()
    for name, value in vars(relation).items():
        other = getattr(again, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@thorough
@given(any_axis(), st.integers(1, 70), st.booleans(), st.booleans())
def test_cuts_hold_every_pair_once(axis, size, turn, from_first):
    relation, expected = axis.spans(), definition(axis)
    if turn:
        relation, expected = relation.reversed(), expected.T
    cut = relation.cut(size, relation.held[2].start if from_first else 0)
    assert torch.equal(cut_pairs(cut, expected.shape), expected)
    assert cut.query[cut.query >= 0].sort().values.tolist() == list(range(expected.shape[0]))
    assert (cut.query >= 0).any(1).all(), "a tile without queries"
    assert set(cut.key[cut.key < 0].tolist()) <= {OUTSIDE, NONE}
    assert cut.query.shape[1] == cut.pattern.shape[1] == size
    there = (cut.query >= 0)[..., None] & (cut.key != NONE)[:, None]
    visible = cut.pattern[cut.kind] >= 0
    assert cut.masked == bool((there & ~visible).any())
    assert not (visible & (cut.query >= 0)[..., None] & (cut.key == NONE)[:, None]).any()
    for tokens, positions, table in (
        (cut.query, cut.query_position, relation.query),
        (cut.key, cut.key_position, relation.key),
    ):
        place = torch.empty(int(table.max()) + 1, dtype=torch.long)  # of a token
        place[table[table >= 0]] = torch.arange(table.shape[1]).expand_as(table)[table >= 0]
        assert torch.equal(positions[tokens >= 0], place[tokens[tokens >= 0]])
    if not turn:
        empty = (visible & (cut.key == OUTSIDE)[:, None]).sum(-1)[cut.query >= 0]
        assert torch.equal(empty[cut.query[cut.query >= 0].sort().indices], outside(axis))


@thorough
@given(any_axis(), st.booleans())
def test_options_are_the_counts_of_their_cuts(axis, keys_hold):
    known = relation(axis, keys_hold)
    for size, begin, tiles, keys in known.options:
        cut = known.cut(size, begin)
        assert cut.query.shape == (tiles, size)
        assert cut.key.shape == (tiles, keys)


@pytest.mark.parametrize(("size", "most"), [(16, 256), (32, 1024), (30, 1024)])
def test_keys_outside_the_map_of_halos_are_not_held(size, most):
    cuts = tile_plan([Halo(size, 8, 3)] * 2, keys_hold=True)
    tiles, held = (math.prod(cut.query.shape[a] for cut in cuts) for a in (0, 1))
    assert tiles * padded_rows(held) <= most


@pytest.mark.parametrize(
    ("axes", "tiles", "queries", "keys"),
    [
        ([Axis(56, 7)] * 2, 49, (8, 8), (14, 14)),
        ([Axis(56, 7, dilation=8)] * 2, 64, (7, 7), (7, 7)),
        ([Axis(28, 7), Axis(56, 7)], 28, (14, 4), (17, 10)),  # both tiles of 14 touch a border
        ([Axis(14, 7)] * 2, 4, (7, 7), (10, 10)),
        ([Partition(56, 7)] * 2, 64, (7, 7), (7, 7)),
        ([Partition(56, 7), Partition(30, 7)], 40, (7, 7), (7, 7)),
        ([Partition(56, 7, is_grid=True)] * 2, 64, (7, 7), (7, 7)),
        ([Partition(56, 7, shift=4), Partition(21, 7)], 27, (7, 7), (7, 7)),
        ([Whole(3136, 49)], 1, (3136,), (49,)),
    ],
)
def test_plans_of_layers(axes, tiles, queries, keys):
    cuts = tile_plan(axes)
    assert math.prod(len(cut.query) for cut in cuts) == tiles
    assert tuple(cut.query.shape[1] for cut in cuts) == queries
    assert tuple(cut.key.shape[1] for cut in cuts) == keys
