"""Gated positional attention: a gate per head mixes attention to content and to positions. See README.md here."""

from dataclasses import dataclass

from torch import Tensor

from visattn.ops import checks
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_floating, check_qkv, check_shape, check_tensors, default_scale
from visattn.ops.dispatch import AttentionProblem, Backends
from visattn.ops.gated_positional import eager, reference, triton
from visattn.ops.registration import traced_as_one


@dataclass(frozen=True, eq=False)
class GatedPositionalProblem(AttentionProblem):
    """q, k [B, H, W, N, D], v [B, H, W, N, Dv], gate [N], pos_weight [N, 3], pos_bias [N]; S = H * W tokens."""

    gate: Tensor
    pos_weight: Tensor
    pos_bias: Tensor | None
    scale: float

    def __post_init__(self) -> None:
        check_qkv(self.q, self.k, self.v)
        if self.q.ndim != 5:
            got = checks.shapes(q=self.q)
            raise ValueError(f"expected q of shape [B, H, W, N, D], got {got}")
        gate, weight, bias, heads = self.gate, self.pos_weight, self.pos_bias, self.q.shape[3]
        check_tensors(gate=gate, pos_weight=weight)
        check_floating(gate=gate, pos_weight=weight, pos_bias=bias)
        check_shape("gate", gate, (heads,), "([N])")
        check_shape("pos_weight", weight, (heads, 3), "([N, 3])")
        check_shape("pos_bias", bias, (heads,), "([N])")

    def flops(self) -> int:
        """Those of attention to all tokens, and of the positional weights' products along columns and rows."""
        (b, h, w, n, d), dv = self.q.shape, self.v.shape[-1]
        return 2 * b * n * h * w * (h * w * (d + dv) + (h + w) * dv)


_backends = Backends(
    "gated_positional_attention",
    GatedPositionalProblem,
    triton.attend,
    eager.attend,
    reference.attend,
    automatic=triton.automatic,
)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    pos_weight: Tensor,
    pos_bias: Tensor | None,
    scale: float | None,
) -> GatedPositionalProblem:
    check_tensors(q=q, pos_weight=pos_weight)
    scale = default_scale(q.shape[-1], scale)
    return GatedPositionalProblem(*to_autocast(q, k, v), gate, pos_weight, pos_bias, scale)


@traced_as_one
def gated_positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    pos_weight: Tensor,
    pos_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """((1 - s) softmax(scale * q k^T) + s R) v with s = sigmoid(gate), among all tokens of a map, per head.

    R = softmax over keys of pos_weight . (dx, dy, dx^2 + dy^2) + pos_bias, where (dy, dx) = key - query in tokens. It
    is the product of a softmax along rows and one along columns, as which it is computed: R itself is never in memory.
    Differentiable in every tensor; the gradient of pos_bias, which the softmax cancels, is 0 but for rounding.

    Args:
        q: Queries [B, H, W, N, D]; N heads of D channels. Any strides.
        k: Keys [B, H, W, N, D].
        v: Values [B, H, W, N, Dv].
        gate: [N]; large: heads attend to positions, small: to content.
        pos_weight: [N, 3], for dx (columns), dy (rows) and the squared distance.
        pos_bias: [N]. Without effect.
        scale: Factor of q k^T. Default: D ** -0.5.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, Dv] of v's dtype; under autocast of its dtype, to which q, k and v are cast.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: q, k, v of different dtypes, or tensors that are not floating point. Parameters may have another
            floating dtype.
        BackendError: The requested backend cannot run this call.

    Source: ConViT (arXiv:2103.10697), equations 5 to 7.
    """
    problem = _problem(q, k, v, gate, pos_weight, pos_bias, scale)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)


def gated_positional_weights(
    q: Tensor,
    k: Tensor,
    pos_weight: Tensor,
    pos_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The two softmaxes that `gated_positional_attention` mixes, for looking at; all of it in memory at once.

    Args: as in `gated_positional_attention`.

    Returns:
        Weights by content [B, H, W, N, H, W] and by position [H, W, N, H, W], in float32 or float64; those of a query
        sum to 1.

    Raises:
        ValueError, TypeError: as in `gated_positional_attention`.
    """
    problem = _problem(q, k, k, pos_weight[..., 0], pos_weight, pos_bias, scale)
    with without_autocast(q.device):
        weights = reference.weights(problem)
    # [..., S, N, S] -> [..., H, W, N, H, W]
    content, positional = (
        x.unflatten(-1, problem.size).unflatten(-4, problem.size) for x in weights
    )
    return content, positional
