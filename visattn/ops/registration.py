"""How tracers see the ops: as plain PyTorch where that says the same for every size, else as one custom op.

The public functions are ordinary Python. `torch.compile` takes each as one call and traces the PyTorch operations
inside it, `torch.export` and `torch.jit.trace` see these alone. While a graph is traced in which a size that an op cuts
a map by is symbolic, the op becomes one node `torch.ops.visattn.<name>` instead, which runs when the sizes are known.
So does an op with a FLOP formula while `FlopCounterMode` counts: what it counts is then the formula, with every version
of PyTorch, on every device, whatever a backend computes. Transforms of `torch.func` take no custom op: within them the
operations inside count.
"""

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import flop_counter
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only

from visattn.ops.autocast import without_autocast
from visattn.ops.cut import contiguous_copy
from visattn.ops.geometry import is_symbolic

P = ParamSpec("P")
R = TypeVar("R")

# PyTorch counts its own attention on other devices, but not on a CPU.
for end, count in ("", flop_counter.sdpa_flop), ("_backward", flop_counter.sdpa_backward_flop):
    packet = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
    flop_counter.flop_registry.setdefault(packet, count)

decompositions: dict[Any, Callable[..., Any]] = {}
"""What `ExportedProgram.run_decompositions` can put in the place of each custom op: plain PyTorch for every size."""


def known_sizes(*args: Any) -> bool:
    """False while a graph is traced in which an int among the arguments, or a size after a tensor's first, is symbolic.

    A tensor's first size is that of the batch, which decides nothing.
    """
    for arg in args:
        values = arg.shape[1:] if isinstance(arg, Tensor) else arg
        if is_symbolic(*(values if isinstance(values, (list, tuple)) else (values,))):
            return False
    return True


# `SymInt`, fake tensors and all other subclasses of tensors are none of these.
_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}
_PLAIN = {*_PLAIN_TENSORS, int, float, bool, str, list, tuple, type(None)}
# Tensors that a transform has wrapped: one that may have ended, or the `vmap` of `is_grads_batched`.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_plain(args: Collection[Any]) -> bool:
    """True where a call with these arguments is run and nothing else: nobody but autograd watches PyTorch's ops.

    What otherwise goes through a custom op, for tracers, modes, transforms and subclasses of tensors, may then be
    called as the function that it is, in a fraction of the time.
    """
    tensors = [x for x in args if type(x) in _PLAIN_TENSORS]
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and _PLAIN.issuperset(map(type, args))
        and not any(map(_is_wrapped, tensors))
        and not any(map(_is_batched, tensors))
    )


def flops_are_counted() -> bool:
    """True under `FlopCounterMode`, but for transforms of `torch.func`, which custom ops do not work with."""
    return _in_mode("FlopCounter") and torch._C._functorch.peek_interpreter_stack() is None


def is_compiling() -> bool:
    """True while `torch.compile` traces; before PyTorch 2.13 its `is_compiling` is silent below Dynamo."""
    if torch.compiler.is_exporting():
        return False
    return torch.compiler.is_compiling() or _in_mode("FunctionalTensorMode")


def _in_mode(name: str) -> bool:
    """By name, as the classes of modes are private and not the same in all versions of PyTorch."""
    return any(name in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


def traced_as_one(function: Callable[P, R]) -> Callable[P, R]:
    """Make `torch.compile` take `function` as one call, and trace what it does below Dynamo, where sizes are known."""
    torch.compiler.allow_in_graph(function)
    return function


def custom_op(
    fake: Callable[P, Tensor] | None = None, flops: Callable[P, int] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a typed function: where the sizes it needs are symbolic it becomes the op `visattn::<its name>`.

    The schema comes from the annotations (`torch.library.infer_schema`).

    Args:
        fake: Empty tensor of the result's shape and dtype for the same arguments.
        flops: FLOPs of a forward pass for the same arguments; a backward pass counts twice that.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        whole = register(name, function, fake, flops)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if known_sizes(*args, *kwargs.values()) and (flops is None or not flops_are_counted()):
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return whole(*bound.args)

        return traced_as_one(call)

    return decorate


def _fresh(x: Tensor, args: Sequence[Any]) -> Tensor:
    """Make x contiguous, as a copy if it shares memory with a tensor among the arguments: no op may return those."""
    taken = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
    shared = x.untyped_storage()._cdata in taken
    return contiguous_copy(x) if shared else x.contiguous()


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def register(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any] | None,
    flops: Callable[..., int] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `visattn::<name>`, differentiable, which tracing does not look into; returns a call of it.

    Args:
        name: Name of the op.
        run: The implementation: a function, or a callable with the `__signature__` that the schema comes from, whose
            result is one tensor or a tuple. The backward pass runs it again and differentiates it.
        fake: Empty tensors of the results' shapes and dtypes.
        flops: FLOPs of a forward pass; a backward pass counts twice that, what it computes again as nothing.
        decomposition: Computes the same for every size, in operations that do not depend on it and write to nothing,
            not even to what they made. Default: `run`.
    """
    hints = {} if hasattr(run, "__signature__") else typing.get_type_hints(run)
    parameters = [
        p.replace(annotation=hints.get(p.name, p.annotation), default=p.empty)
        for p in inspect.signature(run).parameters.values()
    ]
    positions = [i for i, p in enumerate(parameters) if p.annotation in (Tensor, Tensor | None)]

    def prototype() -> None: ...

    # pyrefly: ignore[missing-attribute]: what inspect reads is not declared for functions
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=list[Tensor])
    schema = torch.library.infer_schema(prototype, mutates_args=())

    @torch.library.custom_op(f"visattn::{name}", mutates_args=(), schema=schema)
    def forward(*args: Any) -> list[Tensor]:
        with without_autocast(args[0].device):
            return [_fresh(x, args) for x in _as_tuple(run(*args))]

    forward.register_fake(lambda *args: list(_as_tuple(cast("Callable[..., Any]", fake)(*args))))

    of_backward = schema.replace("(", "(Tensor[] grads, bool[] needs, ", 1)

    @torch.library.custom_op(f"visattn::{name}_backward", mutates_args=(), schema=of_backward)
    def backward(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        inputs, wanted = list(args), [i for i, n in zip(positions, needs, strict=True) if n]

        def call(*given: Tensor) -> tuple[Tensor, ...]:
            for i, t in zip(wanted, given, strict=True):
                inputs[i] = t
            return _as_tuple(run(*inputs))

        with without_autocast(args[0].device):
            # A kernel runs below autograd, where only a functional transform can differentiate.
            differentiate = torch.func.vjp(call, *(args[i] for i in wanted))[1]
            return [_fresh(g, (*grads, *args)) for g in differentiate(tuple(grads))]

    @backward.register_fake
    def _(grads: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        wanted = [args[i] for i, n in zip(positions, needs, strict=True) if n]
        return [x.new_empty(x.shape) for x in wanted]

    ops = torch.ops.visattn
    packet, backward_packet = getattr(ops, name), getattr(ops, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in positions))
        ctx.others = [None if i in positions else x for i, x in enumerate(inputs)]

    def differentiate(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        args = list(ctx.others)
        for i, x in zip(positions, ctx.saved_tensors, strict=True):
            args[i] = x
        needs = [ctx.needs_input_grad[i] for i in positions]
        if counted := flops_are_counted():
            # No kernel can differentiate below a mode: one call to be counted, another for the values.
            on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), (list(grads), needs, *args))
            backward_packet(*on_meta)
        with _disable_current_modes() if counted else contextlib.nullcontext():
            found = iter(backward_packet(list(grads), needs, *args))
        # An empty list counts as one of tensors, and wants as many gradients.
        gradients: list[Any] = [[] if isinstance(x, list) and not x else None for x in args]
        for i, needed in zip(positions, needs, strict=True):
            gradients[i] = next(found) if needed else None
        return tuple(gradients)

    forward.register_autograd(differentiate, setup_context=setup_context)
    if flops is not None:
        formula = functools.partial(flop_counter.register_flop_formula, get_raw=True)
        formula(packet)(lambda *args, out_val=None: flops(*args))
        formula(backward_packet)(lambda grads, needs, *args, out_val=None: 2 * flops(*args))

    def unpacked(*args: Any) -> Any:
        found = packet(*args)
        return found[0] if len(found) == 1 else tuple(found)

    decomposition = decomposition or run
    decompositions[packet.default] = lambda *args: list(_as_tuple(decomposition(*args)))
    return unpacked


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Put plain PyTorch, right for every size, in the place of visattn's custom ops in an exported program.

    For programs with a dynamic height and width that shall run where visattn is not installed.

    Args:
        program: From `torch.export.export`; its dynamic sizes stay.

    Raises:
        NotImplementedError: The program holds an op that has no form for every size; the message says which and why.
    """
    from torch.fx.experimental import _config as config

    # PyTorch otherwise takes for granted that no size is 1 in the whole range if it is not 1 in the example.
    known = hasattr(config, "backed_size_oblivious")
    # pyrefly: ignore[missing-attribute]: PyTorch gives its config modules their methods when they are imported
    oblivious = config.patch(backed_size_oblivious=True) if known else None
    guards = getattr(program, "_guards_code", None)
    with oblivious or contextlib.nullcontext():
        program = program.run_decompositions(decompositions)
    # What it adds as guards and defers to run time are cases of strides that make no difference to the result, such as
    # batch != 1.
    if guards is not None:
        program._guards_code = guards
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
