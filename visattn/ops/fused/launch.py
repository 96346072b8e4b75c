"""Shared by the launchers: launches of kernels, and their description for compiling them where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visattn.ops.fused.tuning import Config

# Multiplying and adding in one instruction is the default up to Triton 3.9, and no longer after it.
OPTIONS = {"enable_fp_fusion": True}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """A launch as the compiler needs it; with `programs` and `arguments` where it was recorded."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int = 2
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}  # noqa: RUF012 (never written to)
    programs: tuple[int, ...] = ()
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never written to)

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with, by name; groups of constants one by one."""
        found = {}
        for i, parameter in enumerate(self.kernel.params):
            if parameter.is_constexpr:
                value = self.constants[(i,)]
                found.update(value._asdict() if hasattr(value, "_asdict") else {parameter.name: value})
        return found

    def compile(self, capability: int) -> Any:
        """The kernel for NVIDIA GPUs of a compute capability times 10 (80, 90, 100); no GPU is needed."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def power_of_2(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def strides(x: Tensor, name: str, axes: str) -> dict[str, int]:
    """{"x_b": ..., "x_h": ..., "X_UNIT": 8} for name "x" and axes "bh...", one letter per axis.

    All strides but the last axis's are in units of X_UNIT elements. Triton loads several elements at once where it
    knows that addresses are aligned, and of strides it would only see that they are multiples of 16: not those of heads
    of 24 channels.
    """
    *outer, last = (
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    unit = 8 if all(stride % 8 == 0 for stride in outer) else 1
    found = {
        f"{name}_{axis}": stride // unit for axis, stride in zip(axes[:-1], outer, strict=True)
    }
    return {**found, f"{name}_{axes[-1]}": last, f"{name.upper()}_UNIT": unit}


def describe(kernel: Any, arguments: dict[str, Any], num_warps: int, num_stages: int = 2) -> Launch:
    """A launch with these arguments; tensors may be on the meta device.

    As when it is launched, integers that are 1 and what is None are constants, and multiples of 16 are known as such.
    """
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def type_of(value: Any, path: tuple[int, ...], is_constant: bool) -> Any:
        if isinstance(value, tuple) and not is_constant:
            return type(value)(*(type_of(x, (*path, i), False) for i, x in enumerate(value)))
        if is_constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return _POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if abs(value) < 2**31 else "i64"

    signature = {
        parameter.name: type_of(arguments[parameter.name], (i,), parameter.is_constexpr)
        for i, parameter in enumerate(kernel.params)
    }
    return Launch(kernel, signature, constants, num_warps, num_stages, attributes)


_recorded: list[list[Launch]] = []


@contextlib.contextmanager
def record() -> Generator[list[Launch]]:
    """Collect the launches of this context instead of launching; what the kernels would have written is undefined."""
    launches: list[Launch] = []
    _recorded.append(launches)
    try:
        yield launches
    finally:
        _recorded.pop()


def launch(
    kernel: Any, programs: int | tuple[int, ...], config: Config, arguments: dict[str, Any]
) -> None:
    """Launch so many programs of a kernel, per axis if several, with the warps and stages of a config."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if _recorded:
        found = describe(kernel, arguments, config.num_warps, config.num_stages)
        _recorded[-1].append(found._replace(programs=grid, arguments=arguments))
    else:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
        kernel[grid](**arguments, **options)
