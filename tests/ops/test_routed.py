"""Routed attention: backends against the reference, both forms of the eager one, and what it keeps."""

import pytest
import torch

from tests.ops.gradients import check
from visattn.ops import chunking, routed_attention
from visattn.ops.geometry import Partition
from visattn.ops.routed import eager

BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


PLAIN = (
    {"q": (2, 11, 10, 2, 24), "k": (2, 9, 7, 2, 24), "v": (2, 9, 7, 2, 24), "weight": (2, 2, 12, 3)},
    {"index": torch.arange(144).view(2, 2, 12, 3) % 15, "region_size": [4, 3], "kv_region_size": [2, 3]},
    True,
    0,
)


def test_gradients_are_added_up_in_one_order_everywhere():
    """What runs on accelerators, on a CPU; and both ways are the transpose of the copy."""
    q, k = torch.randn(2, 2, 5, 4, 3, 7, dtype=torch.float64)
    axes = Partition(5, 2), Partition(4, 3)
    call = eager._Call(q, k, k, torch.randint(6, (2, 6, 4)), None, axes, axes, True, 1.0)
    copies = call.take(call.k, call.k_rows, slice(None))
    x, by_row = torch.randn_like(copies), torch.zeros_like(call.k)
    call.add(by_row, slice(None), x)
    maps = [call.k_map.map(rows, 3) for rows in (by_row, call.sum_by_product(call.lines(x)))]
    torch.testing.assert_close(*maps)
    torch.testing.assert_close((copies * x).sum(), (k * maps[0]).sum())


@pytest.mark.parametrize("chunk", [1, 2000, 10**9])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    monkeypatch.setattr(chunking, "DENSE_KEYS", 0)
    monkeypatch.setattr(chunking, "CHUNK", chunk)
    check(routed_attention, PLAIN, "eager")


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("wrong", [-1, 6, 10**12])
@pytest.mark.usefixtures("form")
def test_a_list_of_what_is_no_region_is_refused(wrong, backend):
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4)
    index = torch.zeros(1, 1, 6, 2).long()
    index[0, 0, 3, 1] = wrong
    with pytest.raises(ValueError, match="expected index of key regions from 0 to 5, got"):
        routed_attention(q, k, v, index, 2, backend=backend)


def test_lists_are_not_looked_at_where_they_have_no_values():
    q, k, v = torch.zeros(3, 1, 4, 6, 2, 4, device="meta")
    index = torch.zeros(1, 1, 6, 2, device="meta").long()
    assert routed_attention(q, k, v, index, 2).shape == q.shape
    q, k, v, index = (torch.zeros_like(x, device="cpu") for x in (q, k, v, index))
    assert torch.func.vmap(lambda i: routed_attention(q, k, v, i, 2))(index.expand(3, *index.shape)).shape[0] == 3
    torch.compile(lambda *x: routed_attention(*x, 2), backend="aot_eager", fullgraph=True)(q, k, v, index)
