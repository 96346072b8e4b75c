"""Where the Triton kernels can run, and how exactly they multiply."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from typing import Any

import torch

from visattn.ops.geometry import is_symbolic

MOST_BYTES = 512  # of a head's channels: several rows of them lie in shared memory
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU: TRITON_INTERPRET=1 before they are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; try `pip install triton`"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # it comes under other names too
        return None
    is_old = tuple(int(n) for n in version.split(".")[:2]) < (3, 4)
    return f"expected Triton 3.4 or newer, got {version}; try a newer PyTorch" if is_old else None


@functools.cache
def _is_old(device: torch.device) -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


@functools.cache
def _has_compiler() -> bool:
    """As Triton looks for one; on Windows it brings its own."""
    return os.name == "nt" or bool(
        os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    )


def can_run(problem: Any) -> str | None:
    """None, or why the attention kernels cannot run a problem, whose heads have q's and v's channels."""
    q, dims = problem.q, (problem.q.shape[-1], problem.v.shape[-1])
    most = MOST_BYTES // q.element_size()
    if max(dims) > most:
        return (
            f"expected heads of at most {most} channels in {q.dtype}, got {dims[0]} and {dims[1]}"
        )
    return can_run_tensors(problem)


def can_run_tensors(problem: Any) -> str | None:
    """None, or why no kernel can run the tensors of a problem, of any number of channels."""
    given = problem.tensors()
    if (missing := _missing()) is not None:
        return missing
    devices = {t.device for t in given}
    if len(devices) > 1:
        return f"tensors are on several devices: {sorted(map(str, devices))}"
    device = given[0].device.type
    if device != "cuda" and not (device == "cpu" and is_interpreting()):
        return f"Triton kernels run on CUDA devices, got tensors on {device!r} (TRITON_INTERPRET=1 runs them on a CPU)"
    if given[0].dtype not in DTYPES:
        return f"Triton kernels take float32, float16 and bfloat16, got {given[0].dtype}"
    if device == "cuda" and _is_old(given[0].device):
        return "Triton kernels need a GPU of compute capability 8.0 or newer"
    if device == "cuda" and not _has_compiler():
        return "Triton needs a C compiler when it first launches a kernel; try to install gcc, or set CC"
    # Of a dynamic batch nobody knows, and a comparison would tie the graph to what it says.
    if not is_symbolic(given[0].shape[0]) and given[0].shape[0] >= 2**16:
        return f"Triton kernels take fewer than 65536 images at a time, got {given[0].shape[0]}"
    return None


def automatic(problem: Any) -> str | None:
    """None, or why "auto" should not take the kernels: the interpreter is for tests."""
    is_gpu = problem.tensors()[0].device.type == "cuda"
    return None if is_gpu else "the interpreter is slow, and is used only on request"


def precision() -> str:
    """How float32 matrices are multiplied: as PyTorch does on this machine, exactly ("ieee") or in "tf32"."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
