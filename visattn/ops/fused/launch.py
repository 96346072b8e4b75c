"""Shared by the launchers: launches of kernels, and how to compile them ahead, also where there is no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visattn.ops.fused.tuning import Config

# Multiplying and adding in one instruction is the default up to Triton 3.9, and no longer after it.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Pointer:
    """A tensor as the compiler sees it: its dtype, and its address modulo 16."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if isinstance(value, tuple):
        found = [_without_tensors(x) for x in value]
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    return value


class _Target:
    """What Triton asks of a driver to compile for NVIDIA GPUs of a compute capability times 10."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 1000 + self.capability  # no GPU: kernels keep what they compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling_for(capability: int) -> Generator[_Target]:
    from triton.runtime import driver

    before = dict(vars(driver))  # without asking for a GPU's
    target = _Target(capability)
    driver.set_active(target)  # pyrefly: ignore[bad-argument-type]: not all of a driver
    try:
        yield target
    finally:
        vars(driver).update(before)


class Launch(NamedTuple):
    """A launch that was recorded, as the compiler needs it."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    programs: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        """What the kernel is compiled with, by name; groups of constants one by one."""
        found = {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                found.update(
                    value._asdict() if hasattr(value, "_asdict") else {parameter.name: value}
                )
        return found

    @property
    def portable(self) -> Launch:
        """With what the compiler asks of tensors in their place."""
        return self._replace(
            arguments={name: _without_tensors(x) for name, x in self.arguments.items()}
        )

    def _call(self) -> dict[str, Any]:
        return {
            **self.portable.arguments,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **OPTIONS,
        }

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for launches of the same code, on any GPU."""
        with _compiling_for(90) as target:
            bind = self.kernel.device_caches[target.get_current_device()][-1]
            _, specialization, options = bind(**self._call())
        return self.kernel.__name__, str(specialization), str(options)

    def compile(self, capability: int) -> Any:
        """The kernel for NVIDIA GPUs of a compute capability times 10 (80, 90, 100); no GPU is needed.

        Triton keeps it where a launch with such arguments looks for it.
        """
        with _compiling_for(capability):
            return self.kernel.warmup(grid=(1,), **self._call())


def power_of_2(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


class Map(NamedTuple):
    """A map as a group of kernel arguments. Axes of length 1 have stride 0."""

    ptr: Tensor  # [B, H, W, N, C]
    stride_b: int
    stride_h: int
    stride_w: int
    stride_n: int
    stride_c: int
    by_8: int | None  # 1 where all strides but stride_c count eights of numbers


def map_of(x: Tensor) -> Map:
    """The group of [B, H, W, N, C], or of [B, W, N, C].

    Triton loads several numbers at once where it knows that addresses are aligned, and of strides it would only see
    that they are multiples of 16: not those of heads of 24 channels. Of eights it sees all.
    """
    *outer, last = (0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))
    if x.ndim == 4:
        outer.insert(1, 0)
    whole = not any(stride % 8 for stride in outer)
    b, h, w, n = (stride // 8 if whole else stride for stride in outer)
    return Map(x, b, h, w, n, last, 1 if whole else None)


def named(kernel: Any, *arguments: Any) -> dict[str, Any]:
    """The arguments of a kernel by their names."""
    return dict(zip(kernel.arg_names, arguments, strict=True))


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


class Prepared(NamedTuple):
    """A compiled kernel, and where among its arguments the tensors are."""

    compiled: Any
    paths: list[tuple[int, ...]]


Prepare = dict[Any, Any]  # by function of the kernel and config, beside other things of the caller


def _paths(arguments: Sequence[Any], within: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield (*within, i)
        elif isinstance(x, tuple):
            yield from _paths(x, (*within, i))


def _are_aligned(arguments: Sequence[Any], paths: list[tuple[int, ...]]) -> bool:
    """Whether all tensors begin at 16-byte borders."""
    for path in paths:
        x: Any = arguments
        for i in path:
            x = x[i]
        if x.data_ptr() % 16:
            return False
    return True


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    config: Config,
    arguments: dict[str, Any] | tuple[Any, ...],
    prepared: Prepare | None = None,
) -> None:
    """Launch so many programs of a kernel, per axis if several, with the warps and stages of a config.

    Arguments are given by name, or in the kernel's order. To find the compiled kernel Triton looks at each of them,
    which takes as long as the rest of a call. A caller spares it that by a `prepared` that it keeps for one device and
    all arguments but tensors, of which it stands for the dtypes: there the kernel is kept. Tensors that do not begin
    at 16-byte borders have kernels of their own, and are left to Triton.
    """
    values = arguments
    if isinstance(values, dict):
        values = [values[name] for name in kernel.arg_names]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = programs if isinstance(programs, tuple) else (programs, 1, 1)
    if _recorded:
        named = dict(zip(kernel.arg_names, values, strict=True))
        _recorded[-1].append(Launch(kernel, named, **options, programs=grid))
        return
    found = None if prepared is None else prepared.get((kernel.fn, config))
    if found is not None and _are_aligned(values, found.paths):
        found.compiled[grid](*values)  # on the current stream, with Triton's hooks for profilers
        return
    compiled = kernel[grid](*values, **options, **OPTIONS)
    paths = list(_paths(values))
    if prepared is not None and _is_compiled(compiled) and _are_aligned(values, paths):
        prepared[kernel.fn, config] = Prepared(compiled, paths)


def _is_compiled(kernel: Any) -> bool:
    """Whether it can be launched as it is; the interpreter gives None."""
    from triton.compiler import CompiledKernel

    return isinstance(kernel, CompiledKernel)
