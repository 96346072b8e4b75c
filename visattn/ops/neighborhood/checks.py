"""What a call of neighborhood attention must satisfy, with the messages for those that do not."""

from __future__ import annotations

from torch import Tensor

from visattn.ops.checks import check_dtypes, check_qkv, check_table
from visattn.ops.geometry import Axis


def check_tensors(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> None:
    check_qkv(q, k, v)
    if (extra_k is None) != (extra_v is None):
        raise ValueError("expected extra_k and extra_v together, got only one of them")
    check_dtypes(q, extra_k, extra_v)
    if extra_k is not None and extra_v is not None:
        head = (q.shape[0], extra_k.shape[1], q.shape[-2])
        if tuple(extra_k.shape) != (*head, q.shape[-1]) or tuple(extra_v.shape) != (*head, v.shape[-1]):
            raise ValueError(
                f"expected extra_k {(*head, q.shape[-1])} and extra_v {(*head, v.shape[-1])} ([B, E, N, D]), "
                f"got {tuple(extra_k.shape)} and {tuple(extra_v.shape)}"
            )


def checked_axes(
    q: Tensor, kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool]
) -> tuple[Axis, ...]:
    spatial = q.shape[1:-2]
    for k, d, s, n in zip(kernel_size, dilation, stride, spatial, strict=True):
        if k < 1 or d < 1 or not 1 <= s <= k:
            raise ValueError(
                f"expected kernel_size >= 1, dilation >= 1 and 1 <= stride <= kernel_size on every axis, got "
                f"kernel_size {kernel_size}, dilation {dilation}, stride {stride}"
            )
        if k * d > n:
            raise ValueError(
                f"expected kernel_size * dilation <= size on every axis, got kernel_size {kernel_size}, dilation "
                f"{dilation} on a map of {tuple(spatial)}; try visattn.ops.pad_to_at_least before projecting q, k, v"
            )
    return tuple(Axis(*a) for a in zip(spatial, kernel_size, dilation, stride, is_causal, strict=True))


def check_bias(
    q: Tensor,
    axes: tuple[Axis, ...],
    bias: Tensor | None,
    extra_k: Tensor | None,
    extra_bias: Tensor | None,
) -> None:
    if bias is not None:
        if any(a.stride > 1 or a.is_causal for a in axes):
            raise ValueError(f"expected stride 1 and no causal axis with a bias, got {axes}")
        check_table(q, bias, [a.kernel_size for a in axes])
    if extra_bias is not None:
        if extra_k is None:
            raise ValueError("expected extra_k and extra_v with extra_bias, got extra_bias alone")
        target, got = (*q.shape[:-1], extra_k.shape[1]), tuple(extra_bias.shape)
        fits = all(n in (1, m) for n, m in zip(reversed(got), reversed(target), strict=False))
        if len(got) > len(target) or not fits:
            raise ValueError(f"expected extra_bias broadcastable to {target} ([B, *spatial, N, E]), got {got}")
