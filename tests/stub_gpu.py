"""Triton's host side without a GPU: everything of a launch on CPU tensors but the launch itself, which is recorded.

`run` starts a Python process in which kernels are compiled instead of interpreted and this driver is active:

    run("ops.window_attention(q, k, v, 7, backend='triton'); print(gpu.launched)", tmp_path / "cache")

Triton binds the arguments, looks the kernel up, compiles it for compute capability 9.0 where it is not in the cache,
and launches it; then nothing happens, so what the kernel would have written is undefined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SHARED = 227 << 10  # bytes of shared memory that a program may have on compute capability 9.0


class Launched(NamedTuple):
    """A launch that reached the driver, with all of the kernel's arguments, constants included, in their order."""

    kernel: str
    programs: tuple[int, int, int]
    num_warps: int
    num_stages: int
    arguments: tuple[Any, ...]


class Launcher:
    """What Triton makes of a compiled kernel to launch it."""

    def __init__(self, driver: StubDriver, source: Any, metadata: Any) -> None:
        self.driver, self.name, self.metadata = driver, source.fn.__name__, metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        _metadata, _launch_metadata, _enter, _exit, *arguments = rest
        warps, stages = self.metadata.num_warps, self.metadata.num_stages
        self.driver.launched.append(Launched(self.name, (x, y, z), warps, stages, tuple(arguments)))


class StubDriver:
    """One GPU of compute capability 9.0, whose tensors are the CPU's; also what Triton calls the driver's utils."""

    def __init__(self) -> None:
        self.launched: list[Launched] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills and most threads."""
        return 1, 1, 64, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> StubDriver:
    """Make the driver Triton's, and the attention kernels take CPU tensors with `backend="triton"`.

    For a process of its own, without TRITON_INTERPRET, before any launch.
    """
    from triton.runtime import driver

    from visattn.ops.fused import attention_call, linear, support  # noqa: F401 (they ask the real one)

    if support.is_interpreting():
        raise RuntimeError("expected kernels that can be compiled, got interpreted ones; try tests.stub_gpu.run")
    found = StubDriver()
    driver.set_active(found)
    support.is_interpreting = lambda: True
    return found


PRELUDE = """
import sys
import torch
from tests import stub_gpu
from visattn import ops
gpu = stub_gpu.install()
"""


def run(code: str, cache: Path, *arguments: str, **environment: str) -> str:
    """Run code after `PRELUDE` in a process of its own, whose Triton cache is a folder; what it printed."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(
            filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "benchmarks")])
        ),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "VISATTN_TUNE": "off",
        **environment,
    }
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def compiled(cache: Path) -> set[str]:
    """The kernels in a Triton cache, each with the folder of its key."""
    return {str(path.relative_to(cache)) for path in cache.glob("*/*.cubin")}
