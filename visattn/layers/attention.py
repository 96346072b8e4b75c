"""What attention modules on tokens share: projections, heads and position table, and attention to the whole map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import default_scale
from visattn.ops.geometry import is_symbolic, plain, read_table
from visattn.ops.registration import traced_as_one


class MultiHeadAttention(nn.Module):
    """Projections, heads and position table, named as in the official modules; subclasses attend.

    Args:
        dim: Channels of the input.
        num_heads: Heads.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.
        table_size: Entries per axis of the position table `rpb` [N, *table_size]; None leaves it out.
        attn_dim: Channels of all heads together; default `dim`.
        out_dim: Channels of the output; default `dim`.
        fused: One projection `qkv`; False: `q`, and `kv` for other tokens.

    Raises:
        ValueError: Heads that do not divide the channels.
    """

    qkv: nn.Linear  # if fused, else
    q: nn.Linear
    kv: nn.Linear
    rpb: nn.Parameter  # where there is a table

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        table_size: tuple[int, ...] | None = None,
        attn_dim: int | None = None,
        out_dim: int | None = None,
        fused: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        attn_dim = attn_dim or dim
        if not 1 <= num_heads <= attn_dim or attn_dim % num_heads:
            raise ValueError(f"expected dim divisible by num_heads, got {attn_dim} and {num_heads}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = attn_dim // num_heads
        for name, parts, used in ("qkv", 3, fused), ("q", 1, not fused), ("kv", 2, not fused):
            linear = nn.Linear(dim, parts * attn_dim, bias=qkv_bias, **dd) if used else None
            self.register_module(name, linear)
        table = None if table_size is None else torch.empty(num_heads, *table_size, **dd)
        self.register_parameter("rpb", None if table is None else nn.Parameter(table))
        self.proj = nn.Linear(attn_dim, out_dim or dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        MultiHeadAttention.reset_parameters(self)  # subclasses reset what they add

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the position table."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split [..., parts * N * D] into `parts` views [..., N, D]."""
        x = x.unflatten(-1, [parts, self.num_heads, self.head_dim])  # [..., parts, N, D]
        return x.unbind(-3)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [..., C] to q, k, v [..., N, D], views of one projection."""
        q, k, v = self._split(self.qkv(x), 3)
        return q, k, v


def weight_and_bias(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Give the parameters of a linear layer with a bias to an op that takes them.

    Quantisers and adapters keep theirs in other forms; what they put in its place is called to tell them.

    Args:
        linear: The layer, or what replaces it.
        x: Any tensor of the dtype and on the device of its inputs.
    """
    # Tensors of other classes have parts; of a class tracers know that.
    if type(linear) is nn.Linear and not hasattr(type(linear.weight), "__tensor_flatten__"):
        return linear.weight, linear.bias
    bias = linear(x.new_zeros(1, linear.in_features))  # [1, O]
    columns = linear(torch.eye(linear.in_features, dtype=x.dtype, device=x.device)) - bias  # [I, O]
    return columns.mT, bias[0]


@traced_as_one
def attend_globally(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend to all keys: q [B, *spatial, N, D], k and v [B, *others, N, D] -> [B, *spatial, N, D].

    Args:
        q: Queries of a map or of a sequence.
        k: Keys.
        v: Values.
        table: Relative position table [N, 2H - 1, 2W - 1] of a map (H, W), which queries and keys are then of; entry
            (H - 1, W - 1) is displacement 0 (key - query).
        scale: Factor of q k^T. Default: D ** -0.5.
    """
    size = plain(q.shape[1:-2])
    # In a graph for every size SDPA would tie the batch to more than one image; a bias that trains would push it off
    # its flash path on a CPU, where explicit products are then faster.
    trains = table is not None and table.requires_grad and torch.is_grad_enabled()
    explicit = is_symbolic(*size) or (trains and q.device.type == "cpu")
    scale = default_scale(q.shape[-1], scale)
    q, k, v = to_autocast(q, k, v)
    with without_autocast(q.device):
        dtype = torch.promote_types(q.dtype, torch.float32) if explicit else q.dtype
        bias = None if table is None else _read_bias(table.to(dtype), size)  # [N, L, L]
        query, key, value = (
            x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)
        )  # [B, N, L or M, D]
        if explicit:
            scores = (query * scale @ key.mT).to(dtype)  # [B, N, L, M]
            if bias is not None:
                scores = scores + bias if is_symbolic(*size) else scores.add_(bias)
            out = scores.softmax(-1).to(value.dtype) @ value  # [B, N, L, D]
        else:
            added = None if bias is None else bias[None]  # [1, N, L, L]
            # [B, N, L, D]
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    return out.transpose(1, 2).reshape(q.shape[0], *size, *v.shape[-2:])  # [B, *spatial, N, D]


def _read_bias(table: Tensor, size: list[int]) -> Tensor:
    """Read a table [N, 2H - 1, 2W - 1] for all pairs of queries and keys of a map of `size`: [N, L, L]."""
    ranks = [torch.arange(n, device=table.device) for n in size]
    # [H, H], [W, W]
    rows, columns = (r - r[:, None] + n - 1 for r, n in zip(ranks, size, strict=True))
    if is_symbolic(*size):  # where splitting an axis would compare its size with that of the parts
        table = table[:, rows[:, None, :, None], columns[None, :, None]]  # [N, H, W, H, W]
        return table.flatten(3).flatten(1, 2)  # [N, L, L]
    return read_table(table, [rows, columns])  # [N, L, L]
