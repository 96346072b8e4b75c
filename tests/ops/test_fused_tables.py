"""Tables of the fused kernels against the product of the definitions of their axes."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_spans import any_axis, definition, outside, pairs, thorough
from visattn.ops.fused import tables
from visattn.ops.fused.tables import (
    MOST_LANES,
    STEP,
    Lookup,
    block_mask,
    decode,
    encode,
    hidden,
    lane_terms,
    regions,
    select,
)
from visattn.ops.geometry import NONE, OUTSIDE, AnyAxis, Axis, Clipped, Halo, Partition, Spans, Whole, ranks, relation

CPU = torch.device("cpu")
TILED = {
    "sliding": (Axis(9, 3), Axis(8, 5)),
    "ragged dilation, causal": (Axis(11, 3, dilation=2), Axis(7, 3, is_causal=True)),
    "stride, even kernel": (Axis(9, 4, stride=2), Axis(6, 2)),
    "one axis": (Axis(37, 5, dilation=3),),
    "three axes": (Axis(4, 3), Axis(5, 3, dilation=1, is_causal=True), Axis(6, 2)),
    "windows, ragged": (Partition(10, 4), Partition(9, 4, shift=1)),
    "grid, ragged": (Partition(10, 4, is_grid=True), Partition(9, 4)),
    "halo": (Halo(9, 4, 2), Halo(6, 4, 1, stride=2)),
    "neighbours that exist": (Clipped(6, 3), Clipped(5, 5)),
    "rows and windows": (Axis(9, 3), Partition(8, 3)),
    "dense": (Whole(19, 7),),
}
each_tiling = pytest.mark.parametrize(
    ("axes", "keys_hold"),
    [(axes, keys_hold) for axes in TILED.values() for keys_hold in (False, True)],
    ids=[f"{name}, {'keys' if keys_hold else 'queries'} hold" for name in TILED for keys_hold in (False, True)],
)


def table_of(axes, heads=2):
    """[N, entries per axis] numbers that are all different."""
    entries = [axis.spans().entries for axis in axes]
    return torch.arange(1, 1 + heads * math.prod(entries), dtype=torch.float64).view(heads, *entries)


def products(axes):
    """[queries, keys] for tokens in the order of the axes: the entry of the flat table of one head, or -1."""
    found = torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        entry = definition(axis)[None, :, None]
        joint = found[:, None, :, None] * axis.spans().entries + entry
        found = torch.where((found[:, None, :, None] < 0) | (entry < 0), -1, joint).flatten(2).flatten(0, 1)
    return found


@each_tiling
def test_tables_are_the_product_of_axes(axes, keys_hold):
    found, expected = block_mask(axes, keys_hold, CPU), products(axes)
    if keys_hold:
        expected = expected.T
    assert found.columns.shape[1] % STEP == 0
    rows, columns = (x[x >= 0].sort().values for x in (found.rows, found.columns))
    assert rows.tolist() == list(range(expected.shape[0]))
    assert columns.unique().tolist() == list(range(expected.shape[1]))

    table, width = table_of(axes), found.columns.shape[1]
    added = found.position_tiles(table)
    assert added.shape == (2, len(found.counts), found.rows.shape[1], found.width)
    visible = added > hidden(added.dtype)
    assert not visible[..., width:].any()
    for head in range(2):
        logits = added[head, found.kind.long(), :, :width]
        entry = torch.where(visible[head, found.kind.long(), :, :width], logits - table[head].min(), -1).long()
        query, key = found.rows[..., None].expand_as(entry), found.columns[:, None].expand_as(entry)
        assert torch.equal(pairs(query, key, entry, expected.shape), expected)
    mask = found.mask(torch.float16)
    assert mask.dtype == torch.float16
    assert torch.equal(mask[0], torch.where(visible[0], 0, hidden(torch.float16)).half())
    unseen = ~visible[0, found.kind.long(), :, :width] & (found.rows >= 0)[..., None]
    assert found.masked == bool((unseen & (found.columns != NONE)[:, None]).any())


@each_tiling
def test_lanes_hide_what_is_outside_of_rectangles(axes, keys_hold):
    found = block_mask(axes, keys_hold, CPU)
    lanes = found.lanes(torch.float16)
    if lanes is None:
        assert sum(pattern.shape[2] for pattern in found.patterns) >= MOST_LANES
        return
    outside, spread = (x.double() for x in lanes)
    assert outside.shape[-1] == spread.shape[-1] <= MOST_LANES
    added, mask = outside @ spread.mT, found.mask(torch.float16)[0]  # [kinds, M, width]
    there = math.prod(pattern.shape[1] for pattern in found.patterns)
    assert torch.equal(added[:, :there] == 0, mask[:, :there] == 0)
    assert (added[added != 0] <= hidden(torch.float16)).all()


class _Calls(TorchDispatchMode):
    """Counts what PyTorch is asked for, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keys_hold", [False, True])
@pytest.mark.parametrize("axes", [(Axis(200, 7), Axis(304, 7)), (Halo(100, 8, 3), Halo(152, 8, 3))], ids=str)
def test_a_new_size_costs_few_calls(axes, keys_hold):
    """Plans are chosen by counts, and only the chosen one is cut."""
    for cache in (block_mask, relation):
        cache.cache_clear()
    with _Calls() as calls:
        block_mask(axes, keys_hold, CPU)
    assert calls.found["unique_dim"] <= len(axes)
    assert calls.found.total() <= 400
    with _Calls() as calls:
        block_mask(axes, keys_hold, CPU)
        block_mask(axes, keys_hold, CPU, extra=3)  # the axes are known
    assert calls.found["unique_dim"] == 0
    assert calls.found.total() <= 120


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_no_setting_of_the_caller_stays_in_a_mask(default):
    axes = (Halo(9, 4, 1), Partition(11, 4, shift=2))
    for cache in (block_mask, relation):
        cache.cache_clear()
    with torch.device(default), torch.inference_mode():
        found = block_mask(axes, True, CPU)
    assert found.columns.device == CPU
    assert not found.columns.is_inference()


@pytest.mark.parametrize("axes", TILED.values(), ids=TILED)
def test_tilings_know_of_holes(axes):
    found = block_mask(axes, False, CPU)
    assert found.has_holes or not any(outside(axis).any() for axis in axes)
    assert found.has_holes == bool((found.columns == OUTSIDE).any())


def groups(found):
    """[groups, together] tiles, NONE where there is none; and which hold rows."""
    members = found.members.long().view(-1, found.together)
    tiles = (found.rows >= 0).any(1).nonzero().flatten().tolist()
    return members, tiles


@pytest.mark.parametrize("few", [False, True])
@each_tiling
def test_members_list_each_tile_once_by_kind(axes, keys_hold, few):
    found = block_mask(axes, keys_hold, CPU, 0, few)
    members, tiles = groups(found)
    assert members[members != NONE].sort().values.tolist() == tiles
    assert sum(found.counts) == len(members)
    for kind, group in enumerate(members.split(found.counts)):
        assert (group[:, 0] != NONE).all()
        assert (found.kind[group[group != NONE]] == kind).all()


@pytest.mark.parametrize("number", [1, 7, 10**6])
@pytest.mark.parametrize("few", [False, True])
@each_tiling
def test_parts_are_the_tiles_of_all_images(axes, keys_hold, few, number):
    found, images = block_mask(axes, keys_hold, CPU, 0, few), 3
    members, tiles = groups(found)
    parts, numbers = found.parts(images, number)
    assert len(parts) == sum(numbers) <= number + len(found.counts)
    met = [(members[first + i // images], i % images) for _, first, a, b in parts.tolist() for i in range(a, b)]
    seen = [(tile, image) for group, image in met for tile in group.tolist() if tile != NONE]
    assert sorted(seen) == [(tile, image) for tile in tiles for image in range(images)]
    for which, first, start, stop in parts.tolist():
        group = members[first + start // images : first + -(-stop // images)]
        assert (found.kind[group[group != NONE]] == which).all()
    assert parts[:, 0].bincount(minlength=len(numbers)).tolist() == numbers


@each_tiling
def test_position_gradient_is_the_adjoint(axes, keys_hold):
    found, table = block_mask(axes, keys_hold, CPU), torch.randn_like(table_of(axes))
    added = found.position_tiles(table)
    grad = torch.randn_like(added)  # also where nothing is seen
    forward = (torch.where(added > hidden(added.dtype), added, 0) * grad).sum()
    backward = (table * found.position_gradient(grad)).sum()
    assert torch.isclose(forward, backward, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys_hold", [False, True])
def test_codes_are_positions_in_the_window(keys_hold):
    axes = TILED["halo"]
    found = block_mask(axes, keys_hold, CPU)
    tokens = found.rows if keys_hold else found.columns
    row, column = tokens // axes[1].length, tokens % axes[1].length
    expected = (row + axes[0].halo) % axes[0].window + ((column + axes[1].halo) % axes[1].window << 16)
    assert torch.equal(found.codes[tokens >= 0], expected[tokens >= 0])
    assert block_mask(TILED["sliding"], keys_hold, CPU).codes is None


def test_lanes_are_terms_of_displacements():
    axes = (Halo(9, 4, 3), Halo(11, 6, 1, stride=2))  # windows of 10 and 8
    found = lane_terms(axes, CPU).long().view(axes[0].queries, axes[1].queries, 2, 16)
    for axis, terms, first in ((axes[0], found[:, :, 0].transpose(0, 1), 0), (axes[1], found[:, :, 1], 19)):
        assert (terms == terms[0]).all()
        assert (terms[..., axis.window :] == -1).all()
        query = torch.arange(axis.queries)
        block, rank = query // axis.queries_per_block, query % axis.queries_per_block
        lane = (block[:, None] * axis.block + torch.arange(axis.window)) % axis.window  # of each slot
        assert torch.equal(terms[0].gather(1, lane), first + axis.displacement()[rank])


@dataclass(frozen=True)
class Behind(AnyAxis):
    """A geometry that nothing in the package knows: a query sees itself and what is up to `reach` behind it."""

    length: int
    reach: int

    def spans(self):
        token = ranks(self.length)
        return Spans(token, token, (token - self.reach).clamp(min=0), token + 1)


@pytest.mark.parametrize("backward", [False, True])
def test_a_new_geometry_needs_no_other_place(backward):
    axes = [Behind(13, 4), Behind(3, 1)]
    assert decode(encode(axes)) == tuple(axes)
    seen = [torch.ones(n, n, dtype=torch.bool).tril().triu(-r) for n, r in ((13, 4), (3, 1))]
    seen = torch.kron(*(x.long() for x in seen)).bool()
    found = block_mask(tuple(axes), backward, CPU)
    visible = found.mask(torch.float32)[0, found.kind.long(), :, : found.columns.shape[1]] == 0
    entry = torch.where(visible, 0, -1)
    query, key = found.rows[..., None].expand_as(entry), found.columns[:, None].expand_as(entry)
    assert torch.equal(pairs(query, key, entry, seen.shape) == 0, seen.T if backward else seen)


@each_tiling
def test_devices_are_only_written_to_and_only_once(axes, keys_hold):
    """Nothing waits for a device (what has no numbers cannot be read), and a second call copies nothing to it."""
    block_mask.cache_clear()

    def use():
        found = block_mask(axes, keys_hold, torch.device("meta"))
        table = torch.empty(2, *found.entries, device="meta")
        found.position_gradient(torch.empty_like(found.position_tiles(table)))
        found.mask(torch.bfloat16), found.lanes(torch.bfloat16)
        assert found.parts(3, 7)[0].device.type == "meta"

    use()
    with _Calls() as calls:
        use()
    assert calls.found["_to_copy"] == 0


@pytest.mark.parametrize("axes", [TILED["windows, ragged"], TILED["grid, ragged"]])
def test_regions_are_windows_row_by_row(axes):
    (rows, row_rank), (columns, column_rank) = (axis.place() for axis in axes)
    (_, high, _), (across, wide, _) = (axis.layout() for axis in axes)
    padded, found = regions(axes, CPU)
    number, places = found.shape
    assert torch.equal(padded[:number, :places], found)
    assert (padded[number:] == NONE).all()
    assert (padded[:, places:] == NONE).all()
    place = (rows[:, None] * across + columns) * high * wide + row_rank[:, None] * wide + column_rank
    expected = torch.full((found.numel(),), OUTSIDE, dtype=torch.int32)
    expected[place.flatten()] = torch.arange(place.numel(), dtype=torch.int32)
    assert torch.equal(found.flatten(), expected)


@thorough
@given(st.lists(any_axis(), max_size=3))
def test_code_round_trip(axes):
    assert decode(encode(axes)) == tuple(axes)


@pytest.mark.parametrize("lines", [(3,), (2, 3)])
def test_select_is_index_select_with_its_gradient(lines):
    x = torch.randn(*lines, 7, dtype=torch.float64, requires_grad=True)
    index = torch.randint(1, 6, (4, 5))  # some entries often, the first and the last never
    out = select(x, Lookup(index, 7, CPU))
    expected = x.index_select(-1, index.flatten()).unflatten(-1, index.shape)
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected))
    assert torch.allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("most", [1, 1 << 26], ids=["line by line", "at once"])
def test_lookups_leave_out_what_is_no_entry(most, monkeypatch):
    monkeypatch.setattr(tables, "_MOST", most)
    index = torch.tensor([[2, 5, 0], [2, 4, 5], [0, 0, 2]])
    lookup = Lookup(index, 5, CPU)
    x, grad = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 3, 3, dtype=torch.float64)
    seen, index = index < 5, index.clamp(max=4)
    assert torch.equal(lookup.read(x, -9.0), torch.where(seen, x[:, index], -9.0))
    expected = torch.zeros(3, 5, dtype=torch.float64).index_add(1, index[seen], grad[:, seen])
    assert torch.allclose(lookup.add(grad), expected, rtol=1e-13, atol=1e-13)
