"""transformers' DiNAT and NAT with an attention that runs: call `visattn.hf.repair()` before models are made.

`DinatModel`, `DinatForImageClassification`, `DinatBackbone` (also inside OneFormer) and, where transformers has them,
the classes of NAT call functions that natten dropped in 0.20; since 4.55 transformers also gives these functions axes
in a wrong order. Repaired, they call `visattn.ops.neighborhood_attention`, on any device, with or without natten, and
compute what transformers up to 4.53 did with natten up to 0.17. Weights stay as they are.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from torch import Tensor

from visattn.ops import neighborhood_attention
from visattn.ops.neighborhood.split import neighborhood_scores, neighborhood_sum

OLDEST, NEWEST = (4, 50), (5, 24)  # versions of transformers whose attention modules were read, and run
MODULES = ("transformers.models.dinat.modeling_dinat", "transformers.models.deprecated.nat.modeling_nat")


class UnknownVersionError(RuntimeError):
    """A version of transformers whose attention may not be what `repair` replaces."""


def repair() -> list[str]:
    """Give the attention modules of DiNAT and NAT a forward pass that runs; once more does no harm.

    Returns:
        The modules of transformers that are repaired now.

    Raises:
        UnknownVersionError: This version of transformers is not known.
        ImportError: There is none.
    """
    try:
        found = version("transformers")
    except ImportError as error:
        expected = f"transformers {OLDEST[0]} or {NEWEST[0]} installed"
        raise ImportError(f"expected {expected}, got none; try pip install transformers") from error
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) <= NEWEST:
        oldest, newest = (".".join(map(str, known)) for known in (OLDEST, NEWEST))
        expected, remedy = f"transformers {oldest} to {newest}", f"pip install transformers=={newest}.*"
        raise UnknownVersionError(f"expected {expected}, got {found}; try {remedy}")
    utils: Any = import_module("transformers.utils")
    is_available = utils.is_natten_available
    utils.is_natten_available = lambda: False  # or the modules import what a new natten does not have
    repaired = []
    try:
        for name in MODULES:
            try:
                module: Any = import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not name.startswith(error.name):
                    raise
                continue  # this version has no NAT
            module.NeighborhoodAttention.forward = _attend
            module.requires_backends = lambda obj, backends: None  # natten is all that they ask for
            repaired.append(name)
    finally:
        utils.is_natten_available = is_available
    return repaired


def _attend(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """[B, H, W, C] -> [B, H, W, C], and the weights [B, N, H, W, K * K] if they are asked for."""
    heads = self.num_attention_heads, self.attention_head_size
    layers = self.query, self.key, self.value
    q, k, v = (layer(hidden_states).unflatten(-1, heads) for layer in layers)  # [B, H, W, N, D]
    window = {"kernel_size": self.kernel_size, "dilation": getattr(self, "dilation", 1)}  # NAT has no dilation
    if not output_attentions and not (self.training and self.dropout.p):
        return (neighborhood_attention(q, k, v, **window, bias=self.rpb, return_lse=False).flatten(-2),)
    q, k, v = (x.movedim(-2, 1) for x in (q, k, v))  # [B, N, H, W, D]
    scores = neighborhood_scores(q * heads[1] ** -0.5, k, **window, bias=self.rpb)
    weights = self.dropout(scores.softmax(-1))  # [B, N, H, W, K * K]
    out = neighborhood_sum(weights, v, **window).movedim(1, -2).flatten(-2)  # [B, H, W, C]
    return (out, weights) if output_attentions else (out,)
