"""Attentions of linear cost against the official formulations, written from their descriptions.

Projections, and what the modules add around the op, are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers
from visattn.ops import (
    dynamic_depthwise_conv,
    efficient_attention,
    flow_attention,
    focused_linear_attention,
    inline_attention,
    relu_linear_attention,
)


def _maps(**tensors: Tensor) -> dict[str, Tensor]:
    """[B, H, W, N, D] -> [B, N * D, H, W], contiguous."""
    return {name: t.flatten(3).permute(0, 3, 1, 2).contiguous() for name, t in tensors.items()}


def official_efficient(case: Case) -> Attend:
    """Maps of the channels first; the heads one after the other."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (t.flatten(2) for t in (q, k, v))
        attended = []
        for i in range(case.heads):
            part = slice(i * case.dim, (i + 1) * case.dim)
            key, query = keys[:, part].softmax(dim=2), queries[:, part].softmax(dim=1)
            context = key @ values[:, part].transpose(1, 2)
            attended.append((context.transpose(1, 2) @ query).unflatten(2, case.size))
        return torch.cat(attended, dim=1)

    attend.into = _maps
    attend.out = lambda out: _maps(out=out)["out"]
    return attend


def _tokens(case: Case, *tensors: Tensor) -> list[Tensor]:
    """[B, H, W, N, D] -> [B, N, H * W, D]."""
    return [t.flatten(1, 2).transpose(1, 2) for t in tensors]


def official_inline(case: Case) -> Attend:
    """A product with q for the attention and one for its sum."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = _tokens(case, q, k, v)
        scale, n = case.dim**-0.5, k.shape[2]
        context = (k.transpose(-2, -1) * (scale / n) ** 0.5) @ (v * (scale / n) ** 0.5)
        total = q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) * scale
        out = q @ context + (1 - total) * v.mean(dim=2, keepdim=True)
        return out.transpose(1, 2).reshape(shape)

    return attend


def official_focused(case: Case) -> Attend:
    """Focus on whole tokens, then a product per head and one for the normaliser."""

    def attend(q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor) -> Tensor:
        with case.mixed_precision(q.device):
            return formula(q, k, v, focus_scale)

    def formula(q: Tensor, k: Tensor, v: Tensor, focus_scale: Tensor) -> Tensor:
        shape, n = q.shape, case.size[0] * case.size[1]
        q, k = ((F.relu(t.flatten(3)) + 1e-6) / F.softplus(focus_scale.flatten()) for t in (q, k))
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        q, k = q**3, k**3
        q, k = q / q.norm(dim=-1, keepdim=True) * q_norm, k / k.norm(dim=-1, keepdim=True) * k_norm
        q, k, v = _tokens(case, q.view(shape), k.view(shape), v)
        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        context = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        return (q @ context * z).transpose(1, 2).reshape(shape)

    return attend


def official_flow(case: Case) -> Attend:
    """A sum or a product over the tokens for every flow."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, eps = q.shape, 1e-6
        q, k, v = _tokens(case, q, k, v)
        q, k = q.sigmoid(), k.sigmoid()

        def flow(x: Tensor, total: Tensor) -> Tensor:
            return ((x + eps) * (total.unsqueeze(2) + eps)).sum(3) + eps  # [B, N, L]

        into, out_of = 1 / flow(q, k.sum(2)), 1 / flow(k, q.sum(2))
        received = flow(q, (k * out_of[..., None]).sum(2))
        sent = flow(k, (q * into[..., None]).sum(2)).clamp(-1, 1)
        competition = sent.softmax(-1) * float(k.shape[2])
        context = k.transpose(-2, -1) @ (v * competition[..., None])
        out = (q * into[..., None]) @ context * received.sigmoid()[..., None]
        return out.transpose(1, 2).reshape(shape)

    return attend


def official_relu(case: Case) -> Attend:
    """Products of all heads, normalised after them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = _tokens(case, q.relu(), k.relu(), v)
        total = (q @ k.sum(2, keepdim=True).transpose(-2, -1)).clamp(min=100)
        out = q @ (k.transpose(-2, -1) @ v) * temperature[:, None, None] / total
        return out.transpose(1, 2).reshape(shape)

    return attend


def official_dynamic_conv(case: Case) -> Attend:
    """A grouped convolution of all samples' channels at once."""

    def attend(x: Tensor, kernels: Tensor) -> Tensor:
        b, h, w, c = x.shape
        maps = x.permute(0, 3, 1, 2).reshape(1, b * c, h, w)
        out = F.conv2d(maps, kernels.reshape(b * c, 1, 3, 3), padding=1, groups=b * c)
        return out.reshape(b, c, h * w).transpose(1, 2).reshape(b, h, w, c)

    return attend


@dataclass(frozen=True)
class Linear(Case):
    """The arguments of `op` are the inputs and the backend."""

    op: ClassVar[Callable[..., Tensor]]

    def visattn(self, backend: str) -> Attend:
        return lambda **inputs: type(self).op(**inputs, backend=backend)

    def work(self) -> tuple[float, float]:
        """Keys to context, context to queries."""
        return 4 * self.batch * self.heads * self.tokens() * self.dim**2, 0


@dataclass(frozen=True)
class Efficient(Linear):
    """Queries normalised over channels, keys over positions."""

    op = staticmethod(efficient_attention)
    providers: ClassVar[Providers] = {"official loop over heads": (official_efficient, None)}
    cuda_providers: ClassVar[Providers] = providers

    def work(self) -> tuple[float, float]:
        """Every query and key channel is exponentiated."""
        return super().work()[0], 2 * self.batch * self.heads * self.tokens() * self.dim


@dataclass(frozen=True)
class InLine(Linear):
    """Weights that sum to 1 and may be negative."""

    op = staticmethod(inline_attention)
    providers: ClassVar[Providers] = {"official formula": (official_inline, None)}
    cuda_providers: ClassVar[Providers] = providers


@dataclass(frozen=True)
class Focused(Linear):
    """Queries and keys of sharpened direction."""

    op = staticmethod(focused_linear_attention)
    providers: ClassVar[Providers] = {"official formula": (official_focused, None)}
    cuda_providers: ClassVar[Providers] = providers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "focus_scale": (self.heads, self.dim)}


@dataclass(frozen=True)
class Flow(Linear):
    """Keys compete, queries are allocated."""

    op = staticmethod(flow_attention)
    providers: ClassVar[Providers] = {"official formula": (official_flow, None)}
    cuda_providers: ClassVar[Providers] = providers


@dataclass(frozen=True)
class Relu(Linear):
    """Rectified queries and keys, a floor under the normaliser."""

    op = staticmethod(relu_linear_attention)
    providers: ClassVar[Providers] = {"official formula": (official_relu, None)}
    cuda_providers: ClassVar[Providers] = providers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(), "temperature": (self.heads,)}


@dataclass(frozen=True)
class DynamicConv(Linear):
    """A 3x3 kernel per sample and channel."""

    op = staticmethod(dynamic_depthwise_conv)
    providers: ClassVar[Providers] = {"official grouped convolution": (official_dynamic_conv, None)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        channels = self.heads * self.dim
        return {"x": (self.batch, *self.size, channels), "kernels": (self.batch, channels, 9)}


# First and third stages at 224 x 224: heads of Swin-T (efficient, focused, ReLU), InLine-PVT and Flowformer; a map of a
# detector.
CASES = [
    Efficient("efficient_56", 8, (56, 56), 3, 32),
    Efficient("efficient_112", 2, (112, 112), 4, 32),
    InLine("inline_56", 8, (56, 56), 2, 32),
    InLine("inline_14", 8, (14, 14), 10, 32),
    DynamicConv("dynamic_conv_56", 8, (56, 56), 2, 32),
    Focused("focused_56", 8, (56, 56), 3, 32),
    Flow("flow_56", 8, (56, 56), 12, 8),
    Relu("relu_56", 8, (56, 56), 3, 32),
]

# Eager forms only: what they cost on a GPU.
CUDA_CASES = [
    Efficient("efficient_56", 128, (56, 56), 3, 32, **MIXED),
    InLine("inline_56", 128, (56, 56), 2, 32, **MIXED),
    Focused("focused_56", 128, (56, 56), 3, 32, **MIXED),
    Flow("flow_56", 128, (56, 56), 12, 8, **MIXED),
    Relu("relu_56", 128, (56, 56), 3, 32, **MIXED),
]
TINY = [Efficient("tiny_efficient", 3, (8, 6), 2, 16, fused=True)]
