"""A door in natten's shape: `import visattn.natten as natten` runs code written for natten, on any device.

It has natten's functions since 0.20 (`na1d`, `na2d`, `na3d`, heads last), its split form up to 0.17 (`na2d_qk`,
`na2d_av`, heads first, with `rpb`; before that `natten2dqkrpb`, `natten2dav`), and its modules of all versions.
natten's submodules are other names of this one: `from visattn.natten.functional import na2d` works. `install()` makes
`import natten` mean this module, for programs that are not to be touched.

Where versions of natten contradict each other:
    * Arguments after `kernel_size` of `na2d` and of the modules are keywords only: the first of them is `stride` since
      0.20 and was `dilation` before.
    * Modules have a position bias only with `rel_pos_bias=True` (0.17) or `bias=True` (0.15, where it was the default).
    * Maps smaller than `kernel_size * dilation` raise, as in functions of all versions and in modules since 0.17.
What chooses among natten's kernels (backends, tile shapes, `use_fused_na`) is accepted and has no effect: see
`visattn.ops.use_backend` and `visattn.ops.tune`. The interface is that of SHI-Labs/NATTEN 0.14 to 0.21 (MIT).
"""

import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visattn.layers.attention import MultiHeadAttention
from visattn.ops import neighborhood_attention
from visattn.ops.checks import check_tensors, one_int, spatial_axes
from visattn.ops.neighborhood import windows_per_axis
from visattn.ops.neighborhood.split import neighborhood_scores, neighborhood_sum

Ints = int | Sequence[int] | None
Bools = bool | Sequence[bool] | None

__version__ = "0.21.0"  # whose interface this is, for programs that compare
HAS_LIBNATTEN = True  # programs ask it to learn whether the fused functions run

_SUBMODULES = ("context", "functional", "modules", "types", *(f"na{t}{n}d" for t in ("", "tten") for n in (1, 2, 3)))
_TUNING = re.compile(
    "(backward_)?(q|kv)_tile_(shape|size)|backward_(kv_splits|use_pt_reduction)|kernel_schedule|run_persistent_kernel"
    "|torch_compile|backend"
)
_SWITCHES = re.compile(
    "(allow|disable|enable|use)_(autotuner|flex_compile(_backprop)?|f(used_)?na|gemm_na|kv_parallelism_in_fused_na"
    "|tf32(_in_gemm_na)?|tiled_na)|set_memory_usage_preference|has_f(used_)?na|is_f(used_)?na_enabled"
)
_ABSENT = {
    "attention": "neighborhoods alone are here; try torch's scaled_dot_product_attention, or varlen_attn for sequences "
    "packed into one",
    "use_deterministic_algorithms": "backward passes hold operations of PyTorch's, too; try its function of this name",
    "get_(bwd_)?configs_for_.*": "natten's kernels are not here, and no configurations of them; try visattn.ops.tune",
}


def _check_tensors(*tensors: Tensor | None) -> None:
    """Refuse the kinds of tensors that only natten's own kernels take."""
    for x in (x for x in tensors if x is not None):
        check_tensors(**{"every input": x})
        if x.is_nested or x.is_sparse or (x.is_floating_point() and x.element_size() == 1):
            got = "a nested one" if x.is_nested else "a sparse one" if x.is_sparse else f"{x.dtype}"
            why = "no kernel here packs maps of several sizes, nor has the scales that fp8 needs"
            raise NotImplementedError(f"expected dense tensors of at least 16 bits, got {got}: {why}")


def _check_arguments(positional: tuple[Any, ...], tuning: dict[str, Any]) -> None:
    """Refuse what versions of natten read in two ways, and what does not just choose a kernel."""
    if positional:
        place = "natten up to 0.17 has dilation in that place, from 0.20 stride"
        raise TypeError(f"expected keywords after kernel_size, got {positional}: {place}; try dilation= or stride=")
    inner = [tuning.pop(name, None) or {} for name in ("attention_kwargs", "xformers_kwargs")]
    wrong = [name for names in (tuning, *inner) for name in names if not _TUNING.fullmatch(name)]
    if wrong:
        raise NotImplementedError(f"expected arguments of natten's that choose a kernel, got {wrong}")


def _windows(axes: int, kernel_size: Any, dilation: Ints, stride: Ints, is_causal: Bools) -> dict[str, Any]:
    """List the arguments of a window per axis, with natten's defaults in the place of None."""
    dilation, stride = (1 if steps is None else steps for steps in (dilation, stride))
    window = windows_per_axis(axes, kernel_size, dilation, stride, False if is_causal is None else is_causal)
    return dict(zip(("kernel_size", "dilation", "stride", "is_causal"), window, strict=True))


def _share(query: Tensor, key: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Repeat heads [..., N / groups, D] that several heads of the query [..., N, D] share."""
    heads = key.shape[-2] if key.ndim == query.ndim else 0  # what does not fit is refused later
    groups = query.shape[-2] // heads if heads else 1
    tensors = key, *others
    return tensors if groups < 2 else tuple(x if x is None else x.repeat_interleave(groups, -2) for x in tensors)


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *positional: Any,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    rpb: Tensor | None = None,
    **tuning: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention with one to three axes, heads last; see `visattn.ops.neighborhood_attention`.

    Args:
        query: [B, *spatial, N, D].
        key, value: [B, *spatial, N, D and Dv]; of fewer heads, each serves several heads of the query.
        kernel_size, stride, dilation, is_causal: One value, or one per axis.
        scale: Factor of q k^T. Default: D ** -0.5.
        additional_keys, additional_values: [B, E, N, D and Dv] that every query sees, too.
        return_lse: Also return the log-sum-exps, [B, *spatial, N].
        rpb: Of natten 0.17: relative position table [N, 2 * kernel_size - 1 per axis]; not with causal axes.
        **tuning: natten's arguments that choose a kernel; no effect.
    """
    _check_arguments(positional, tuning)
    check_tensors(query=query, key=key, value=value)
    _check_tensors(query, key, value, additional_keys, additional_values)
    windows = _windows(spatial_axes(query), kernel_size, dilation, stride, is_causal)
    key, value, extra_k, extra_v = _share(query, key, value, additional_keys, additional_values)
    how: dict[str, Any] = {"bias": rpb, "scale": scale or None, "return_lse": return_lse}
    return neighborhood_attention(query, key, value, **windows, extra_k=extra_k, extra_v=extra_v, **how)


na1d = na2d = na3d = neighborhood_attention_generic  # axes are the tensors', as in natten


def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries to different keys, [..., D] each, by their log-sum-exps [...].

    Where all of these are -inf, no key was visible to any, and their outputs are zeros.
    """
    lse = torch.stack(list(lse_tensors))
    total = lse.logsumexp(0)
    weights = lse.masked_fill(total == float("-inf"), 0).softmax(0).unsqueeze(-1)
    return (torch.stack(list(outputs)) * weights).sum(0).to(outputs[0].dtype), total


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    dilation: Ints = 1,
    additional_keys: Tensor | None = None,
    is_causal: Bools = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Unscaled scores of the M keys that a query sees, heads first: [B, N, *spatial, D] -> [B, N, *spatial, M + E].

    Scores of additional keys [B, N, E, D] come last; `rpb` as in `na2d`, which needs far less memory.
    """
    check_tensors(query=query, key=key)
    _check_tensors(query, key, additional_keys)
    windows = _windows(spatial_axes(query), kernel_size, dilation, 1, is_causal)
    return neighborhood_scores(query, key, bias=rpb, extra_k=additional_keys, **windows)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    dilation: Ints = 1,
    additional_values: Tensor | None = None,
    is_causal: Bools = False,
) -> Tensor:
    """Sum values [B, N, *spatial, Dv] by weights [B, N, *spatial, M + E], laid out as from `na2d_qk`."""
    check_tensors(attn=attn, value=value)
    _check_tensors(attn, value, additional_values)
    windows = _windows(spatial_axes(value), kernel_size, dilation, 1, is_causal)
    return neighborhood_sum(attn, value, extra_v=additional_values, **windows)


def na2d_qk_with_bias(query: Tensor, key: Tensor, bias: Tensor | None, *window: Any, **others: Any) -> Tensor:
    """`na2d_qk` with the table in third place, as in natten up to 0.15."""
    return na2d_qk(query, key, *window, rpb=bias, **others)


na1d_qk = na3d_qk = natten1dqk = natten2dqk = na2d_qk
na1d_av = na3d_av = natten1dav = natten2dav = na2d_av
na1d_qk_with_bias = natten1dqkrpb = natten2dqkrpb = na2d_qk_with_bias


class _NeighborhoodAttention(MultiHeadAttention):
    """Multi-head neighborhood attention, [B, *spatial, C] -> the same; parameters are called as natten's.

    `embed_dim` was `dim` up to natten 0.17; `rel_pos_bias`, a learned relative position table, was `bias` up to 0.15.
    With `attn_drop`, attention is in the split form while training.
    """

    axes = 0

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: Ints = None,
        *positional: Any,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dim: int | None = None,
        bias: bool = False,
        use_experimental_ops: bool = False,
    ) -> None:
        _check_arguments(positional, {})
        dim = embed_dim if dim is None else dim
        if dim is None or num_heads is None or kernel_size is None:
            got = f"{dim}, {num_heads} and {kernel_size}"
            raise TypeError(f"expected embed_dim (or dim), num_heads and kernel_size, got {got}")
        windows = _windows(self.axes, kernel_size, dilation, stride, is_causal)
        self.kernel_size, self.dilation, self.stride, self.is_causal = (tuple(n) for n in windows.values())
        has_table = rel_pos_bias or bias
        if has_table and any(self.is_causal):
            raise NotImplementedError("expected no causal axis with rel_pos_bias: its table is for keys on both sides")
        table = tuple(2 * k - 1 for k in self.kernel_size) if has_table else None
        dim, num_heads = one_int("embed_dim", dim), one_int("num_heads", num_heads)
        super().__init__(dim, num_heads, qkv_bias, proj_drop, table)
        self.embed_dim, self.scale = dim, float(qk_scale or self.head_dim**-0.5)
        self.attn_drop = nn.Dropout(attn_drop)

    def _window(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("kernel_size", "dilation", "stride", "is_causal")}

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != self.axes + 2:
            raise ValueError(f"expected x with {self.axes} axes between batch and channels, got {tuple(x.shape)}")
        q, k, v = self._project(x)  # [B, *spatial, N, D]
        if self.training and self.attn_drop.p:
            q, k, v = (t.movedim(-2, 1) for t in (q, k, v))  # [B, N, *spatial, D]
            scores = neighborhood_scores(q * self.scale, k, bias=self.rpb, **self._window())
            weights = self.attn_drop(scores.softmax(-1))  # [B, N, *spatial, M]
            x = neighborhood_sum(weights, v, **self._window()).movedim(1, -2)  # [B, *spatial, N, D]
        else:
            x = neighborhood_attention(q, k, v, bias=self.rpb, scale=self.scale, return_lse=False, **self._window())
        return self.proj_drop(self.proj(x.flatten(-2)))

    def extra_repr(self) -> str:
        how = ", ".join(f"{name}={values}" for name, values in self._window().items())
        return f"head_dim={self.head_dim}, num_heads={self.num_heads}, {how}, rel_pos_bias={self.rpb is not None}"


class NeighborhoodAttention1D(_NeighborhoodAttention):
    axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    axes = 3


def __getattr__(name: str) -> Any:
    """Find natten's submodules, types, switches and questions about its kernels."""
    if name in _SUBMODULES:
        return sys.modules[__name__]
    if re.fullmatch("(Dimension|CausalArg)([123]D)?Type(OrDed)?", name):
        return Any
    if _SWITCHES.fullmatch(name):
        return lambda *args, **kwargs: True
    for absent, reason in _ABSENT.items():
        if re.fullmatch(absent, name):
            return partial(_refuse, name, reason)
    raise AttributeError(f"expected a name of natten's that visattn.natten has, got {name!r}")


def _refuse(name: str, reason: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"expected functions of natten's that visattn.natten has, got {name}: {reason}")


def _name_submodules(package: str) -> None:
    this = sys.modules[__name__]
    sys.modules.update({package: this, **{f"{package}.{name}": this for name in _SUBMODULES}})


def install() -> None:
    """Make `import natten` and imports from its submodules find this module; before natten is imported."""
    found = sys.modules.get("natten")
    if found not in (None, sys.modules[__name__]):
        version = getattr(found, "__version__", "of an unknown version")
        raise ImportError(f"expected natten not to be imported yet, got natten {version}; try install() before it")
    _name_submodules("natten")


_name_submodules(__name__)
