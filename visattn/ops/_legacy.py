"""Gone when all op folders are converted."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import register_flop_formula

# PyTorch counts its own attention on other devices, but not on a CPU.

_library = torch.library.Library("visattn", "FRAGMENT")


def composite(schema: str, fn: Callable[..., Any]) -> Any:
    """Define op `schema` with the differentiable Python implementation `fn`; returns its `torch.ops` entry."""
    name = _library.define(schema)
    _library.impl(name, fn, "CompositeImplicitAutograd")
    return getattr(torch.ops.visattn, name.rpartition("::")[2])


def sizes_are_known(args: tuple[Any, ...]) -> bool:
    """False while a graph is traced in which a size of a tensor, or an int among the arguments, is symbolic."""
    for arg in args:
        values = arg.shape if isinstance(arg, Tensor) else arg if isinstance(arg, (list, tuple)) else (arg,)
        if any(isinstance(n, torch.SymInt) for n in values):
            return False
    return True


def flops_are_counted() -> bool:
    """True under `FlopCounterMode`, but for transforms of `torch.func`, which custom ops do not work with."""
    return _in_mode("FlopCounter") and torch._C._functorch.peek_interpreter_stack() is None


def _is_compiling() -> bool:
    """True while `torch.compile` traces; before PyTorch 2.13 `is_compiling` is silent below Dynamo."""
    if torch.compiler.is_exporting():
        return False
    return torch.compiler.is_compiling() or _in_mode("FunctionalTensorMode")


def _in_mode(name: str) -> bool:
    """By name, as the classes of modes are private and not the same in all versions of PyTorch."""
    return any(name in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


def _fresh(x: Tensor, args: Sequence[Any]) -> Tensor:
    """x, contiguous, as a copy if it shares memory with a tensor among the arguments: an op may not return those."""
    taken = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
    shared = x.untyped_storage()._cdata in taken
    return x.clone(memory_format=torch.contiguous_format) if shared else x.contiguous()


def opaque(
    name: str,
    arguments: str,
    results: int,
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define `visattn::<name>_opaque`, differentiable, which tracing does not look into; returns its `torch.ops` entry.

    Args:
        name: Name of the op.
        arguments: The schema between the parentheses, without default values.
        results: How many tensors it returns; one that is not asked for is an empty tensor.
        run: The implementation. The backward pass runs it again and differentiates it.
        fake: Empty tensors of the results' shapes and dtypes.
        flops: FLOPs of a forward pass by the arguments, shapes in place of tensors; a backward pass counts twice that,
            what it computes again as nothing.
    """
    is_tensor = [argument.startswith("Tensor") for argument in arguments.split(", ")]
    positions = [i for i, yes in enumerate(is_tensor) if yes]
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"

    @torch.library.custom_op(f"visattn::{name}_opaque", mutates_args=(), schema=f"({arguments}) -> {returned}")
    def forward(*args: Any) -> Any:
        out = run(*args)
        return _fresh(out, args) if results == 1 else tuple(_fresh(x, args) for x in out)

    forward.register_fake(fake)

    @torch.library.custom_op(
        f"visattn::{name}_opaque_backward",
        mutates_args=(),
        schema=f"(Tensor[] grads, bool[] needs, {arguments}) -> Tensor[]",
    )
    def backward(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        inputs, wanted = list(args), [i for i, n in zip(positions, needs, strict=True) if n]

        def call(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
            for i, t in zip(wanted, given, strict=True):
                inputs[i] = t
            return run(*inputs)

        # A kernel runs below autograd, where only a functional transform can differentiate.
        _, differentiate = torch.func.vjp(call, *(args[i] for i in wanted))
        found = differentiate(grads[0] if results == 1 else tuple(grads))
        return [_fresh(g, (*grads, *args)) for g in found]

    @backward.register_fake
    def _(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        return [args[i].new_empty(args[i].shape) for i, n in zip(positions, needs, strict=True) if n]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in positions))
        ctx.others = [x for x, yes in zip(inputs, is_tensor, strict=True) if not yes]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        args = [next(tensors) if yes else next(others) for yes in is_tensor]
        needs = [ctx.needs_input_grad[i] for i in positions]
        if counted := flops_are_counted():
            # No kernel can differentiate below a mode: one call to be counted, another for the values.
            on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), (list(grads), needs, *args))
            backward_packet(*on_meta)
        with _disable_current_modes() if counted else contextlib.nullcontext():
            found = iter(backward_packet(list(grads), needs, *args))
        return tuple(next(found) if yes and ctx.needs_input_grad[i] else None for i, yes in enumerate(is_tensor))

    forward.register_autograd(differentiate, setup_context=setup_context)
    packet, backward_packet = (getattr(torch.ops.visattn, f"{name}_opaque{suffix}") for suffix in ("", "_backward"))
    if flops is not None:
        register_flop_formula(packet)(lambda *args, out_shape=None: flops(*args))
        register_flop_formula(backward_packet)(lambda grads, needs, *args, out_shape=None: 2 * flops(*args))
    return packet


def define_op(
    schema: str,
    run: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    flops: Callable[..., int] | None = None,
    whole_on_cpu: bool = False,
) -> Any:
    """Define op `schema`, whose work depends on sizes: composite where they are known, opaque where symbolic.

    It has one result. `run` and `fake` take the schema's arguments by position; `run`'s own default values stand for
    those left out. `flops`: as for `opaque`. With `whole_on_cpu`, `torch.compile` for a CPU keeps the op opaque too:
    its eager form is the faster one there. Programs of `torch.export` see into it nevertheless.
    """
    name, _, rest = schema.partition("(")
    arguments = rest[: rest.rindex(") -> ")].replace("Tensor(a)", "Tensor")
    hidden = opaque(name, ", ".join(a.partition("=")[0] for a in arguments.split(", ")), 1, run, fake, flops)
    defaults = [p.default for p in inspect.signature(run).parameters.values()]

    def call(*args: Any) -> Tensor:
        args = (*args, *defaults[len(args) :])
        whole = whole_on_cpu and args[0].device.type == "cpu" and _is_compiling()
        if whole or not sizes_are_known(args) or (flops is not None and flops_are_counted()):
            return hidden(*args)
        return run(*args)

    return composite(schema, call)


import os
from dataclasses import dataclass

from visattn.ops.dispatch import BackendError, Decision, _decisions, _log_once, _requested
from visattn.ops.fused.support import DTYPES, MOST_BYTES, _has_compiler, _is_old, _missing, is_interpreting


def always(*args: Any, **kwargs: Any) -> None:
    """The `refusal` of a backend that runs everything."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: What users write in `backend=`.
        refusal: Called with the op's checked arguments; returns why this backend cannot run them, or None if it can.
        run: Called with the same arguments; returns the op's result.
        automatic: Called with the same arguments; returns why "auto" should pass this backend over although it can run
            them when asked for by name, or None.
    """

    name: str
    refusal: Callable[..., str | None]
    run: Callable[..., Any]
    automatic: Callable[..., str | None] = always


class Dispatcher:
    """The ordered backends of one op; "auto" prefers the earlier ones."""

    def __init__(self, op: str, backends: tuple[Backend, ...]) -> None:
        self.op = op
        self.backends = backends

    def select(self, requested: str, *args: Any, **kwargs: Any) -> Backend:
        """The backend for these arguments.

        Raises:
            BackendError: An explicitly requested backend is unknown or refuses, or none can run.
        """
        if requested == "auto":
            requested = _requested.get() or os.environ.get("VISATTN_BACKEND") or "auto"
        refusals = {}
        for backend in self.backends:
            if requested not in ("auto", backend.name):
                continue
            reason = backend.refusal(*args, **kwargs)
            if reason is None and requested == "auto":
                reason = backend.automatic(*args, **kwargs)
            if reason is None:
                if (decisions := _decisions.get()) is not None:
                    decisions.append(Decision(self.op, backend.name, refusals))
                return backend
            refusals[backend.name] = reason
            _log_once(self.op, backend.name, reason)
        if not refusals:
            names = ", ".join(repr(b.name) for b in self.backends)
            raise BackendError(f"{self.op}: expected backend 'auto', {names}; got {requested!r}")
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise BackendError(f"{self.op}: no requested backend can run this call ({why}); try backend='auto'")

    def __call__(self, requested: str, *args: Any, **kwargs: Any) -> Any:
        return self.select(requested, *args, **kwargs).run(*args, **kwargs)


def refusal(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot run these tensors, or None."""
    given = [t for t in tensors if t is not None]
    if (missing := _missing()) is not None:
        return missing
    if any(t.device != given[0].device for t in given):
        return f"tensors are on several devices: {sorted({str(t.device) for t in given})}"
    device = given[0].device.type
    if device != "cuda" and not (device == "cpu" and is_interpreting()):
        return f"Triton kernels run on CUDA devices, got tensors on {device!r} (TRITON_INTERPRET=1 runs them on a CPU)"
    if given[0].dtype not in DTYPES:
        return f"Triton kernels take float32, float16 and bfloat16, got {given[0].dtype}"
    if device == "cuda" and _is_old(given[0].device):
        return "Triton kernels need a GPU of compute capability 8.0 or newer"
    if device == "cuda" and not _has_compiler():
        return "Triton needs a C compiler when it first launches a kernel; try to install gcc, or set CC"
    if len(given[0]) >= 2**16:
        return f"Triton kernels take fewer than 65536 images at a time, got {len(given[0])}"
    return None


def attention_refusal(q: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """Why the attention kernels cannot run tensors with heads of q's and v's channels, or None."""
    most = MOST_BYTES // q.element_size()
    if max(q.shape[-1], v.shape[-1]) > most:
        return f"expected heads of at most {most} channels in {q.dtype}, got {q.shape[-1]} and {v.shape[-1]}"
    return refusal(q, v, *others)


def automatic(*tensors: Tensor | None) -> str | None:
    """Why "auto" should not take the kernels: the interpreter is for tests."""
    given = [t for t in tensors if t is not None]
    return None if given[0].device.type == "cuda" else "the interpreter is slow, and is used only on request"
