"""What limits the kernels on a GPU: the most that it can do, and passes with a part of their work left out."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from bench_device import Cpu
from op_cases import Case
from op_gate import runner
from torch import Tensor

from visattn.ops.fused import attention_call, attention_kernels
from visattn.ops.fused.launch import launch
from visattn.ops.fused.tuning import Config

BLOCK = 4096  # numbers that a program has at a time
L2_NUMBERS = 1 << 22  # 16 MiB, which the L2 cache holds and no L1 cache


@triton.jit
def read_kernel(x, out, BLOCKS, BLOCK: tl.constexpr):
    """Every program reads all BLOCKS blocks of x and writes their sum; each begins elsewhere."""
    lane, total = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for step in range(BLOCKS):
        at = (tl.program_id(0) * 31 + step) % BLOCKS
        total += tl.load(x + at * BLOCK + lane, cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * BLOCK + lane, total)


@triton.jit
def exp_kernel(out, ROUNDS, BLOCK: tl.constexpr):
    """So many exponentials of every number, one of the other."""
    lane = tl.arange(0, BLOCK)
    x = lane.to(tl.float32) / BLOCK
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + lane, x)


def median(run: Callable[[], object], device: Cpu, calls: int = 20) -> float:
    """Seconds of a call."""
    for _ in range(3):
        run()
    return statistics.median(device.seconds(run) for _ in range(calls))


def ceilings(device: Any) -> dict[str, float]:
    """Bytes that are read from the L2 cache and exponentials, each per second."""
    programs = 4 * device.processors
    x = torch.rand(L2_NUMBERS, device=device.torch_device)
    out = torch.empty(programs * BLOCK, device=device.torch_device)
    shared = {"out": out, "BLOCK": BLOCK}
    config = Config(BLOCK, BLOCK, 8, 2)

    def read() -> None:
        launch(read_kernel, programs, config, {"x": x, "BLOCKS": x.numel() // BLOCK, **shared})

    def exp() -> None:
        launch(exp_kernel, programs, config, {"ROUNDS": 2048, **shared})

    return {
        "bytes from L2": programs * x.nbytes / median(read, device),
        "exponentials": programs * BLOCK * 2048 / median(exp, device),
    }


def one_key() -> contextlib.AbstractContextManager[Any]:
    """All keys that a program reads are the same one, which its L1 cache has."""
    tables: dict[int, Tensor] = {}

    def changed(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: changed(value) for name, value in x.items()}
        if type(x) is tuple:
            return tuple(changed(value) for value in x)
        if not hasattr(x, "columns"):
            return x
        zeros = tables.setdefault(x.columns.data_ptr(), x.columns.clamp(max=0))
        return x._replace(columns=zeros)

    def launch_changed(kernel: Any, programs: Any, config: Config, arguments: Any, *prepared: Any) -> None:
        launch(kernel, programs, config, changed(arguments), *prepared)

    return mock.patch.object(attention_call, "launch", launch_changed)


@functools.cache
def _without_exponentials() -> Any:
    """The kernels' module with x in the place of exp2(x)."""
    text, found = re.subn(r"\btl\.exp2\(", "(", Path(attention_kernels.__file__).read_text())
    if not found:
        raise RuntimeError("expected tl.exp2 in attention_kernels.py, got none; try to adapt this ablation")
    file = Path(tempfile.mkdtemp()) / "attention_kernels_without_exponentials.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def no_exponentials() -> contextlib.AbstractContextManager[Any]:
    """Weights that are not exponentials; what they are is no number of use."""
    return mock.patch.dict(sys.modules, {attention_kernels.__name__: _without_exponentials()})


ABLATIONS = {
    "whole": contextlib.nullcontext,
    "no bias": contextlib.nullcontext,
    "one key": one_key,
    "no exponentials": no_exponentials,
}


def ablation(case: Case, mode: str, part: str, device: Cpu) -> float:
    """Seconds of a pass of the Triton kernels without a part."""
    inputs = case.fuse(case.inputs(device.torch_device))
    if part == "no bias":
        inputs = {name: x for name, x in inputs.items() if name in case.maps}
    attend = case.visattn("triton")
    with ABLATIONS[part]():
        return median(runner(attend, inputs, mode), device)
