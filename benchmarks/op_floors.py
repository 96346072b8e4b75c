"""The least time that an attention could take on a GPU: bytes, products or exponentials, whichever takes longest.

    forward  = max(bytes / bytes_per_s, flops / flops_per_s, exponentials / exps_per_s)
               bytes: q, k, v and out once, and the log-sum-exps in float32
    backward = max(bytes / bytes_per_s, 5 flops / flops_per_s, 2 exponentials / exps_per_s)
               bytes: one kernel reads q, k, v, out, their gradient and writes that of q, another reads q, k, v, the
               gradient of out and writes those of k and v; flops: 2.5 times the forward's in each; the log-sum-exps
               and the products of out and its gradient are written or read four times

Flops and exponentials are those of the tiles that a kernel on tensor cores visits (`Case.work`), of which a part is
masked. The rates are an H200's: a large copy, a large product in bfloat16, and 16 exponentials per clock and
multiprocessor; a run measures the first two on its own GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from op_cases import Case


@dataclass(frozen=True)
class Rates:
    """What the GPU does per second."""

    bytes_per_s: float = 4.3e12
    flops_per_s: float = 790e12
    exps_per_s: float = 3.71e12


def map_bytes(case: Case) -> int:
    """Of one of q, k, v, out."""
    return case.batch * case.tokens() * case.heads * case.dim * case.dtype.itemsize


def useful_bytes(case: Case, mode: str) -> int:
    """What must be read and written at least: q, k, v, out; with the backward also q, k, v, out and 4 gradients."""
    return map_bytes(case) * (4 if mode == "forward" else 12)


def floor(case: Case, mode: str, rates: Rates) -> float:
    """Seconds of a forward pass, or of both passes."""
    flops, exps = case.work()
    row_bytes = 4 * case.batch * case.tokens() * case.heads
    forward = max(
        (4 * map_bytes(case) + row_bytes) / rates.bytes_per_s, flops / rates.flops_per_s, exps / rates.exps_per_s
    )
    if mode == "forward":
        return forward
    return forward + max(
        (12 * map_bytes(case) + 4 * row_bytes) / rates.bytes_per_s,
        5 * flops / rates.flops_per_s,
        2 * exps / rates.exps_per_s,
    )
