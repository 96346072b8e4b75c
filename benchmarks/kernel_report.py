"""Compile the Triton kernels for GPUs that need not be here, and list what a program of each takes of a GPU.

    python benchmarks/kernel_report.py                                    # compute capabilities 8.0, 9.0 and 10.0
    python benchmarks/kernel_report.py --capabilities 90 --dtypes bfloat16 --cases "window" "halo"
    python benchmarks/kernel_report.py --out benchmarks/results/kernels  # also kernels_sm80.json, kernels_sm80.md, ...

Launches are those of one forward and backward pass with the default configs; equal ones are listed once. Registers and
stack are read with the `cuobjdump` that comes with Triton. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import number, show, version, write
from torch import Tensor

from visattn.ops.fused import depthwise, linear
from visattn.ops.fused.attention import fused_attention
from visattn.ops.fused.launch import Launch, record
from visattn.ops.fused.support import is_interpreting
from visattn.ops.geometry import Axis, Clipped, Halo, Partition, Whole

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
CAPABILITIES = (80, 90, 100)
# Of a streaming multiprocessor: bytes of shared memory; all have 65536 registers and room for 64 warps of 32 threads.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
COLUMNS = (
    "case",
    "kernel",
    "dtype",
    "tile",
    "warps",
    "stages",
    "registers",
    "stack",
    "shared",
    "warps/SM",
    "products on",
    "16-byte copies",
)
TEXT = """# What the Triton kernels take of a GPU of compute capability {capability}

Compiled without a GPU by `{command}` ({setting}). One row per distinct launch of a forward and backward pass with the
default config, under the first case that needs it. *tile*: rows that a program holds x columns that it streams per
step, or positions x channels. *registers* and *stack* (bytes; all that is not 0 is spilled to memory) are of a thread,
*shared* memory (bytes) of a program; from these follow the warps that fit on a multiprocessor at once, of 64. *products
on*: the tensor core instruction of the compiled products. *16-byte copies*: asynchronous copies to shared memory that
move 16 bytes, of all.
Nothing here is a time: not measured on a GPU.
"""


@dataclass
class Result:
    """A distinct launch compiled for one capability; sizes in bytes, None where they could not be read.

    Attributes:
        constants: What the kernel was compiled with, without zeros; True as 1.
        products: How often each tensor core instruction stands in the compiled code.
        copies: Asynchronous copies to shared memory; `wide_copies` of them move 16 bytes.
    """

    case: str
    kernel: str
    dtype: str
    capability: int
    num_warps: int
    num_stages: int
    constants: dict[str, int | str]
    cubin: int
    registers: int | None
    stack: int | None
    shared: int
    warps_per_sm: int | None
    products: dict[str, int]
    copies: int
    wide_copies: int


def maps(dtype: torch.dtype, size: Sequence[int], heads: int, dim: int, parts: int = 3) -> tuple[Tensor, ...]:
    """Views [1, S, N, D] of one projection."""
    tokens = torch.Size(size).numel()
    return torch.zeros(1, tokens, parts, heads, dim, dtype=dtype, requires_grad=True).unbind(2)


def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Parameters, and what is made of them."""
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def far_apart(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Maps whose tokens need addresses of 64 bits; the memory between them is never touched."""
    step = 2**31 // 256
    return tuple(torch.empty(2**31, dtype=dtype).as_strided((1, 256, 1, 32), (2**31, step, 32, 1)) for _ in range(3))


def sliding(size: int, heads: int, dim: int, bias: bool = False, **options: Any) -> Callable[[torch.dtype], tuple]:
    def make(dtype: torch.dtype) -> tuple:
        more = {"bias": table(heads, 13, 13)} if bias else {}
        return maps(dtype, (size, size), heads, dim), [Axis(size, 7, **options)] * 2, more

    return make


def extended(dtype: torch.dtype) -> tuple:
    extra_k, extra_v = maps(dtype, (4, 4), 2, 32, parts=2)
    return maps(dtype, (56, 56), 2, 32), [Axis(56, 7)] * 2, {"extra_k": extra_k, "extra_v": extra_v}


def padded(dtype: torch.dtype) -> tuple:
    more = {"bias": table(2, 13, 13), "key_mask": torch.ones(1, 3136, dtype=torch.bool)}
    return maps(dtype, (56, 56), 2, 32), [Axis(56, 7)] * 2, more


def window(dtype: torch.dtype) -> tuple:
    return maps(dtype, (56, 56), 2, 32), [Partition(56, 7)] * 2, {"bias": table(2, 13, 13)}


def halo(dtype: torch.dtype) -> tuple:
    more = {"rel_pos": table(1, 1024, 4, 54, dtype=dtype), "zero_keys": True}
    return maps(dtype, (32, 32), 4, 32), [Halo(32, 8, 3)] * 2, more


def routed(dtype: torch.dtype, weighted: bool = False) -> tuple:
    more = {"kv_indices": torch.zeros(1, 1, 49, 4, dtype=torch.long)}
    if weighted:
        more["weight"] = table(1, 1, 49, 4, dtype=dtype)
    return maps(dtype, (56, 56), 2, 32), [Partition(56, 8)] * 4, more


def aggregated(dtype: torch.dtype) -> tuple:
    extra_k, extra_v = maps(dtype, (7, 7), 3, 24, parts=2)
    extra = {"extra_k": extra_k, "extra_v": extra_v, "extra_bias": table(1, 3136, 3, 49, dtype=dtype)}
    return maps(dtype, (56, 56), 3, 24), [Clipped(56, 3)] * 2, {"bias": table(3, 3, 3), **extra}


def agents(dtype: torch.dtype, gather: bool) -> tuple:
    (few,), (many, more) = maps(dtype, (7, 7), 3, 32, parts=1), maps(dtype, (56, 56), 3, 32, parts=2)
    queries, keys = (49, 3136) if gather else (3136, 49)
    q, k, v = (few, many, more) if gather else (many, few, few)
    return (q, k, v), [Whole(queries, keys)], {"bias": table(3, queries, keys, dtype=dtype)}


# Published layers: NAT and DiNAT, Swin and MaxViT, HaloNet, BiFormer, TransNeXt, Agent-Swin.
CASES: dict[str, Callable[[torch.dtype], tuple]] = {
    "neighborhood": sliding(56, 2, 32),
    "neighborhood, bias": sliding(56, 2, 32, bias=True),
    "neighborhood, dilated": sliding(56, 2, 32, bias=True, dilation=8),
    "neighborhood, causal": sliding(56, 2, 32, is_causal=True),
    "neighborhood, head dim 64": sliding(14, 6, 64, bias=True),
    "neighborhood, lse": sliding(56, 2, 32),
    "neighborhood, extra keys": extended,
    "neighborhood, hidden keys": padded,
    "neighborhood, 64-bit": lambda dtype: (
        tuple(x.detach().requires_grad_() for x in far_apart(dtype)),
        [Axis(16, 7)] * 2,
        {},
    ),
    "window": window,
    "halo": halo,
    "routed": routed,
    "routed, weighted": lambda dtype: routed(dtype, weighted=True),
    "aggregated": aggregated,
    "agent, gather": lambda dtype: agents(dtype, gather=True),
    "agent, spread": lambda dtype: agents(dtype, gather=False),
}


def depthwise_convs(dtype: torch.dtype) -> list[Tensor]:
    """TransNeXt's heads, with weights of either dtype, OverLoCK's windows, and InLine's convolution, in float32 with a
    larger kernel."""
    channels, taps = (64, 25) if dtype == torch.float32 else (96, 9)
    return [
        depthwise.mix_neighbours(table(2, 56, 56, 2, 24, dtype=dtype), table(2, 56, 56, 2, 9, dtype=dtype)),
        depthwise.mix_neighbours(table(2, 28, 28, 4, 32, dtype=dtype), table(2, 28, 28, 4, 9)),
        depthwise.mix_windows(table(2, 14, 14, 8, 16, dtype=dtype), table(2, 14, 14, 8, 169, dtype=dtype), (13, 13)),
        depthwise.dynamic_conv(table(2, 14, 14, channels, dtype=dtype), table(2, channels, taps, dtype=dtype)),
    ]


def linear_products(dtype: torch.dtype) -> list[Tensor]:
    """Keys into a context and queries out of it."""
    found = []
    for dim in (96,) if dtype == torch.float32 else (32, 24):
        q, k, v = maps(dtype, (56, 56), 2, dim)
        found.append(linear.apply(q, linear.outer(k, v)))
    return found


# Ops that are not attention in tiles: their results, to be differentiated.
OTHERS: dict[str, Callable[[torch.dtype], list[Tensor]]] = {"depthwise": depthwise_convs, "linear": linear_products}


def launches_of(name: str, dtype: torch.dtype) -> list[Launch]:
    """Of a forward and backward pass."""
    if name in OTHERS:
        with record() as launches:
            torch.stack([x.sum() for x in OTHERS[name](dtype)]).sum().backward()
        return launches
    (q, k, v), axes, more = CASES[name](dtype)
    leaves = [x for x in (q, k, v, *more.values()) if isinstance(x, Tensor) and x.requires_grad]
    with record() as launches:
        out, lse = fused_attention(q, k, v, axes, q.shape[-1] ** -0.5, **more)
        results = [out, lse] if name.endswith("lse") else [out]
        torch.autograd.grad(results, leaves, [torch.zeros_like(x) for x in results])
    return launches


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack of a thread, None where no `cuobjdump` came with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not program.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def warps_per_sm(registers: int | None, shared: int, warps: int, capability: int) -> int | None:
    """How many warps fit on a multiprocessor; registers are given to warps by 256, shared memory has 1 KB overhead."""
    if registers is None:
        return None
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(65536 // (per_warp * warps), SHARED[capability] // (shared + 1024), 64 // warps, 32)
    return programs * warps


def compiled(case: str, dtype: str, launch: Launch, capability: int) -> Result:
    program = launch.compile(capability)
    cubin, ptx = program.asm["cubin"], program.asm["ptx"]
    registers, stack = resources(cubin)
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ .*?, .*?, (0x\w+|\d+)", ptx)
    wanted = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    constants = {n: x if isinstance(x, str) else int(x) for n, x in launch.options.items() if x}
    return Result(
        case,
        launch.kernel.__name__.removesuffix("_kernel"),
        dtype,
        capability,
        launch.num_warps,
        launch.num_stages,
        constants,
        len(cubin),
        registers,
        stack,
        program.metadata.shared,
        warps_per_sm(registers, program.metadata.shared, launch.num_warps, capability),
        {name: ptx.count(text) for name, text in wanted.items() if text in ptx},
        len(copies),
        sum(int(size, 0) == 16 for size in copies),
    )


def row(result: Result) -> list[str]:
    constants = result.constants
    tile = [str(n) for name, n in constants.items() if name.startswith("BLOCK_")]
    kinds = [name.lower() for name in ("TRANSPOSED", "PER_CHANNEL", "CLAMPED", "WIDE") if constants.get(name)]
    numbers = (result.num_warps, result.num_stages, result.registers, result.stack, result.shared, result.warps_per_sm)
    return [
        result.case,
        ", ".join([result.kernel, *kinds]).replace("_", " "),
        result.dtype,
        "x".join(tile),
        *(number(n, "d") for n in numbers),
        " ".join(result.products) or "no tensor cores",
        f"{result.wide_copies} of {result.copies}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*CASES, *OTHERS)
    parser.add_argument("--capabilities", nargs="+", type=int, default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--out", type=Path, help="write OUT_sm<capability>.json and .md")
    args = parser.parse_args(argv)
    if is_interpreting():
        print("expected kernels that can be compiled, got interpreted ones; try without TRITON_INTERPRET", flush=True)
        return 2
    os.environ["VISATTN_TUNE"] = "off"
    found: dict[tuple[str, str, str], tuple[str, str, Launch]] = {}
    for dtype in args.dtypes:
        for case in args.cases:
            for launch in launches_of(case, DTYPES[dtype]):
                found.setdefault(launch.key, (case, dtype, launch))
    for capability in args.capabilities:
        results = [compiled(*launch, capability) for launch in found.values()]
        show(results, COLUMNS, row, f"compute capability {capability / 10}")
        if args.out:
            out = args.out.with_name(f"{args.out.name}_sm{capability}")
            text = TEXT.replace("{capability}", str(capability / 10))
            write(results, COLUMNS, row, text, "kernel_report.py", argv, out, {"triton": version("triton")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
