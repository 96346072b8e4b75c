"""Search the best launch of the Triton kernels for the cases of `op_cases`, forward and backward, and keep it.

    python benchmarks/tune_ops.py --device cuda                          # every case, in bfloat16 and float16
    python benchmarks/tune_ops.py --device cuda --cases na2d_56 --again  # measure anew what is known
    TRITON_INTERPRET=1 python benchmarks/tune_ops.py --device cpu --cases tiny_na2d_bias --dtypes float32  # minutes

Prints for each kernel and shape class what was chosen and how much faster than the default it was, and where the file
is that keeps it (`visattn/ops/fused/README.md` says more). The interpreter's times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from op_cases import CUDA_CASES, TINY, Case
from report import number, publish

import visattn
from visattn.ops import BackendError
from visattn.ops.fused import tuning_cache
from visattn.ops.fused.support import is_interpreting
from visattn.ops.fused.tuning import Choice, Config

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
COLUMNS = (
    "case",
    "dtype",
    "kernel",
    "shape class",
    "default",
    "chosen",
    "from",
    "default ms",
    "ms",
    "x faster",
    "note",
)


@dataclass
class Result:
    """A kernel that a case launched, or why it launched none."""

    case: str
    dtype: str
    choice: Choice | None = None
    note: str = ""


def can_run(device: str) -> str | None:
    """Why kernels cannot run on this device, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available here, so there is nothing to tune; the interpreter takes --device cpu"
    if device == "cpu" and not is_interpreting():
        return "Triton kernels run on a CPU only in the interpreter: set TRITON_INTERPRET=1, or use --device cuda"
    return None


def run_case(case: Case, device: str) -> None:
    """One forward and backward pass with the Triton backend."""
    leaves = {name: t.requires_grad_() for name, t in case.inputs(device).items()}
    out = case.visattn("triton")(**(case.fuse(leaves) if case.fused else leaves))
    torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))


def tune_case(case: Case, device: str, dtype: str, again: bool) -> list[Result]:
    """What was chosen for the kernels of a case."""
    try:
        with visattn.ops.tune(again) as report:
            run_case(replace(case, dtype=DTYPES[dtype]), device)
    except BackendError as error:
        return [Result(case.name, dtype, note=str(error))]
    return [Result(case.name, dtype, choice) for choice in report]


def row(result: Result) -> list[str]:
    choice = result.choice
    if choice is None:
        return [result.case, result.dtype, *[""] * 8, result.note]
    dropped = f"{len(choice.dropped)} dropped" if choice.dropped else ""
    times = [number(choice.default_ms, ".4f"), number(choice.median_ms, ".4f"), number(choice.times_faster)]
    shape_class = " ".join(map(str, choice.shape_class))
    configs = [short(choice.default), short(choice.config)]
    return [result.case, result.dtype, choice.kernel, shape_class, *configs, choice.source, *times, dropped]


def short(config: Config) -> str:
    """Rows held x rows per step, warps, stages."""
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="some of the device's cases in op_cases")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float16"])
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    args = parser.parse_args(argv)
    if reason := can_run(args.device):
        print(reason, file=sys.stderr)
        return 1

    cases = {case.name: case for case in (CUDA_CASES if args.device == "cuda" else TINY)}
    if unknown := set(args.cases or ()) - set(cases):
        parser.error(f"expected --cases among {', '.join(cases)}; got {', '.join(sorted(unknown))}")
    results = []
    for case in (cases[name] for name in args.cases or cases):
        for dtype in args.dtypes:
            print(f"{case.name}, {dtype} ...", flush=True)
            results += tune_case(case, args.device, dtype, args.again)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    publish(results, COLUMNS, row, "", "tune_ops.py", argv, None, title=f"launch configs on {name}")
    print(f"Kept in {tuning_cache.directory() / tuning_cache.file_name(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
