"""FlexAttention, compiled, with a mask over pairs of tokens and a position bias as `score_mod`.

Masks are arithmetic on rows and columns: captured tables of booleans would cost a load per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from op_cases import Attend, Case

# Of one axis: whether query i sees key j, and the entry of the position table for the pair.
Sees = Callable[[Any, Any], Any]
Entry = Callable[[Any, Any], Any]
# Larger masks do not fit into memory as the dense tensor that an uncompiled `create_block_mask` makes of them.
_LARGE = 8192


def flex(case: Case, sees: tuple[Sees, Sees], entries: tuple[Entry, Entry], keys: tuple[int, int]) -> Attend:
    """Maps [B, H, W, N, D], keys and values on a map of `keys`; bias [N, rows, columns], or [B, N, tokens, rows or
    columns] for each axis.

    The block mask is made in the first call and does not count.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    width, key_width = case.size[1], keys[1]
    lengths = (case.tokens(), keys[0] * keys[1])
    made: list[Any] = []

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return sees[0](q // width, k // key_width) & sees[1](q % width, k % key_width)

    def block_mask(device: torch.device) -> Any:
        if not made:
            large = {"_compile": True} if max(lengths) > _LARGE else {}
            made.append(create_block_mask(mask, None, None, *lengths, device=device, **large))
        return made[0]

    def attention(q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor, ...], blocks: Any) -> Tensor:
        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            row = entries[0](i // width, j // key_width)
            column = entries[1](i % width, j % key_width)
            if len(biases) == 2:
                return s + biases[0][b, h, i, row] + biases[1][b, h, i, column]
            return s + biases[0][h, row, column]

        return flex_attention(q, k, v, score_mod=score if biases else None, block_mask=blocks)

    compiled = torch.compile(attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
        views = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(*views, biases, block_mask(q.device)).transpose(1, 2).unflatten(1, case.size)

    return attend
