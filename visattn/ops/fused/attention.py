"""Softmax attention of any relation of queries and keys by the Triton kernels, as custom ops with full backward.

`fused_attention` is what op folders map onto. Forward and backward are custom ops, so that graphs hold one node for
each, and an `autograd.Function` joins them, which function transforms can look through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visattn.ops.fused.attention_launch import Call, run_backward, run_forward
from visattn.ops.fused.tables import encode
from visattn.ops.geometry import AnyAxis
from visattn.ops.registration import is_plain

# Those that have gradients; two more that have none follow.
_TENSORS = ("q", "k", "v", "bias", "rel_pos", "extra_k", "extra_v", "extra_bias", "weight")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? rel_pos, Tensor? extra_k, Tensor? extra_v, "
    "Tensor? extra_bias, Tensor? weight, Tensor? kv_indices, Tensor? key_mask, int[] axes, bool zero_keys, float scale"
)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    if not (call.q.numel() and call.v.numel()):
        return _fake_forward(*args)
    with torch.cuda.device_of(call.q):
        return run_forward(call)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(
    do: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> list[Tensor]:
    *inputs, needs = args
    call = Call(*inputs, do=do, dlse=dlse, o=out, lse=lse)
    if not (call.q.numel() and call.v.numel()):
        return [x.new_zeros(x.shape) for x, n in zip(inputs, needs, strict=False) if n]
    wanted = dict(zip(_TENSORS, needs, strict=True))
    with torch.cuda.device_of(call.q):
        found = run_backward(call, wanted)
    return [getattr(found, name).contiguous() for name in _TENSORS if wanted[name]]


def _fake_backward(*args: Any) -> list[Tensor]:
    inputs, needs = args[4:-1], args[-1]
    return [x.new_empty(x.shape) for x, n in zip(inputs, needs, strict=False) if n]


def _one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any, op: Any) -> tuple[Any, Any]:
    """`torch.vmap` of an op: calls for each element, stacked."""
    found = []
    for i in range(info.batch_size):
        found.append(
            op(
                *(
                    x.select(d, i) if isinstance(d, int) else x
                    for x, d in zip(args, in_dims, strict=True)
                )
            )
        )
    stacked = [torch.stack(x) for x in zip(*found, strict=True)]
    if op is torch.ops.visattn.fused_backward:
        return stacked, [0] * len(stacked)
    return tuple(stacked), (0,) * len(stacked)


def _register(name: str, run: Any, fake: Any, schema: str) -> None:
    op = torch.library.custom_op(f"visattn::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_vmap(partial(_one_by_one, op=getattr(torch.ops.visattn, name)))


_register("fused_forward", _forward, _fake_forward, f"({_INPUTS}) -> (Tensor, Tensor)")
_GIVEN = "Tensor do, Tensor? dlse, Tensor out, Tensor lse"
_register(
    "fused_backward",
    _backward,
    _fake_backward,
    f"({_GIVEN}, {_INPUTS}, bool[] needs) -> Tensor[]",
)


class _Gradients(torch.autograd.Function):
    """`visattn::fused_backward`, which has no derivative; under function transforms it must be a function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.visattn.fused_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the Triton backend can be differentiated only once; try backend='eager'"
        )


class _Attention(torch.autograd.Function):
    """`visattn::fused_forward` and `visattn::fused_backward` as one function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.visattn.fused_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[: len(_TENSORS) + 2])
        ctx.how = inputs[len(_TENSORS) + 2 :]
        ctx.set_materialize_grads(False)

    @staticmethod
    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(out)
        needs = list(ctx.needs_input_grad[: len(_TENSORS)])
        args = (do, dlse, out, lse, *tensors, *ctx.how, needs)
        is_direct = not torch.is_grad_enabled() and is_plain(args)
        found = iter(_backward(*args) if is_direct else _Gradients.apply(*args))
        return (*(next(found) if n else None for n in needs), *(None,) * (2 + len(ctx.how)))


class _PlainAttention(torch.autograd.Function):
    """`_Attention` where no op needs to be seen, and no function transform (which wants `setup_context`) runs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*args)
        _Attention.setup_context(ctx, args, output)
        return output

    # pyrefly: ignore[bad-override]: as many gradients as forward has results
    backward = _Attention.backward


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[AnyAxis],
    scale: float,
    *,
    bias: Tensor | None = None,
    rel_pos: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_bias: Tensor | None = None,
    kv_indices: Tensor | None = None,
    weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    zero_keys: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the keys that a query sees, and the log-sum-exp of the logits.

    Maps are flat: S tokens in the order of the axes. Differentiable once in every floating tensor, deterministic.

    Args:
        q: Queries [B, Sq, N, D]. Any strides but a channel stride of 1 (others are copied).
        k: Keys [B, Sk, N, D].
        v: Values [B, Sk, N, Dv].
        axes: Which keys a query sees, per axis; with `kv_indices` the two axes of the queries' regions, then the keys'.
        scale: Factor of q k^T.
        bias: Position table [N, entries per axis], or with one axis [N, Sq, Sk] one number per pair.
        rel_pos: Decomposed relative position [B, Sq, N, 2 * window_h - 1 + 2 * window_w - 1] for two axes of halos, a
            query's terms for all displacements of rows, then of columns: a pair gets the sum of its two, entry slot in
            the window - rank of the query in its block + window - 1 of each axis. Not together with `bias`.
        extra_k: More keys [B, E, N, D] that every query sees, in the same softmax.
        extra_v: Their values [B, E, N, Dv].
        extra_bias: [B or 1, Sq or 1, N or 1, E or 1], added to their logits.
        kv_indices: The key regions of a block mask [B, 1 or N, query regions, topk].
        weight: Factors like `kv_indices` of the keys and values of a listed region.
        key_mask: Boolean [B, Sk]; False hides a key of the map. Queries without any key give zeros, and -inf as lse.
        zero_keys: Places outside the map take part with k = v = 0.

    Returns:
        out [B, Sq, N, Dv] of q's dtype and lse [B, Sq, N] in float32.
    """
    if scale <= 0:  # the kernels scale by positive numbers
        q, scale = q * scale, 1.0
    tensors = (q, k, v, bias, rel_pos, extra_k, extra_v, extra_bias, weight, kv_indices, key_mask)
    args = (*tensors, encode(axes), zero_keys, scale)
    if not is_plain(args):
        return _Attention.apply(*args)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _PlainAttention.apply(*args)
    return _forward(*args)


def flat(x: Tensor) -> Tensor:
    """[B, *spatial, N, D] -> [B, S, N, D], a view where strides allow it."""
    return x.flatten(1, -3)
