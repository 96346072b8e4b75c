"""Aggregated attention: a token attends to its neighbours and to the pooled map. See README.md in this folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.ops import checks
from visattn.ops.aggregated import eager, reference, triton
from visattn.ops.autocast import to_autocast, without_autocast
from visattn.ops.checks import check_floating, check_tensors, per_axis
from visattn.ops.dispatch import Backends, Problem
from visattn.ops.geometry import Pooled, is_symbolic, plain
from visattn.ops.registration import traced_as_one


def _check(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check that tensors, where given, are floating point and have these shapes."""
    for name, (tensor, shape) in expected.items():
        check_floating(**{name: tensor})
        checks.check_shape(name, tensor, shape)


@dataclass(frozen=True, eq=False)
class AggregatedProblem(Problem):
    """The arguments of `aggregated_attention`, parameters in the dtype that logits are made in."""

    q: Tensor
    pool_k: Tensor
    pool_v: Tensor
    temperature: Tensor
    query_embedding: Tensor
    cpb_weight1: Tensor
    cpb_bias1: Tensor
    cpb_weight2: Tensor
    cpb_bias2: Tensor
    pretrain_size: Sequence[int]
    bias_size: Sequence[int]
    local_k: Tensor | None
    local_v: Tensor | None
    kernel_size: int
    local_bias: Tensor | None
    tokens: Tensor | None
    token_bias: Tensor | None
    return_lse: bool

    def __post_init__(self) -> None:
        q, pool_k, pool_v = self.q, self.pool_k, self.pool_v
        check_tensors(q=q, pool_k=pool_k, pool_v=pool_v)
        if q.ndim != 5 or pool_k.ndim != 5 or pool_v.ndim != 5:
            expected = "q [B, H, W, N, D], pool_k [B, PH, PW, N, D] and pool_v [B, PH, PW, N, Dv]"
            got = checks.shapes(q=q, pool_k=pool_k, pool_v=pool_v)
            raise ValueError(f"expected {expected}, got {got}")
        (b, _, _, n, d), pool, dv = q.shape, pool_k.shape[1:3], pool_v.shape[4]
        _check(pool_k=(pool_k, (b, *pool, n, d)), pool_v=(pool_v, (b, *pool, n, dv)))
        w1, b1, w2, b2 = self.cpb_weight1, self.cpb_bias1, self.cpb_weight2, self.cpb_bias2
        temperature, embedding = self.temperature, self.query_embedding
        check_tensors(temperature=temperature, query_embedding=embedding)
        check_tensors(cpb_weight1=w1, cpb_bias1=b1, cpb_weight2=w2, cpb_bias2=b2)
        f = w1.shape[0] if w1.ndim else 0
        _check(temperature=(temperature, (n,)), query_embedding=(embedding, (n, d)))
        _check(cpb_weight1=(w1, (f, 2)), cpb_bias1=(b1, (f,)))
        _check(cpb_weight2=(w2, (n, f)), cpb_bias2=(b2, (n,)))
        self._check_local()
        checks.check_dtypes(q, pool_k, pool_v, self.local_k, self.local_v)
        self._check_sizes()

    def _check_local(self) -> None:
        k, v, bias = self.local_k, self.local_v, self.local_bias
        others = (bias, self.tokens, self.token_bias)
        if (k is None) != (v is None) or (k is None and any(x is not None for x in others)):
            given = ", ".join("no" if x is None else "a" for x in (k, v, *others))
            raise ValueError(
                "expected k and v together, and local_bias, tokens or token_bias only with them, got "
                f"{given} k, v, local_bias, tokens, token_bias"
            )
        if k is not None:
            if self.kernel_size < 1 or self.kernel_size % 2 == 0:
                raise ValueError(f"expected an odd kernel_size >= 1, got {self.kernel_size}")
            (*lead, n, d), slots = self.q.shape, self.kernel_size**2
            _check(k=(k, (*lead, n, d)), v=(v, (*lead, n, self.v.shape[-1])))
            _check(local_bias=(bias, (n, slots)), tokens=(self.tokens, (n, d, slots)))
            _check(token_bias=(self.token_bias, (n, slots)))

    def _check_sizes(self) -> None:
        sizes, pretrain = list(self.bias_size), list(self.pretrain_size)
        if min(pretrain) < 1:
            raise ValueError(f"expected pretrain_size of 2 ints >= 1, got {pretrain}")
        if len(sizes) not in (0, 4):
            raise ValueError(f"expected bias_size of no or 4 ints (H, W, PH, PW), got {sizes}")
        size = (*self.size, *self.pooled)
        for h, w, ph, pw in (size, self.bias_size or size):
            if not is_symbolic(h, w, ph, pw) and not (1 <= ph <= h and 1 <= pw <= w):
                raise ValueError(
                    f"expected a map with at least one and at most as many pooled keys as tokens per axis, got "
                    f"{(ph, pw)} pooled keys for a map of {(h, w)}; try a larger image"
                )

    @property
    def v(self) -> Tensor:
        """The pooled values, which have the channels of the result."""
        return self.pool_v

    @property
    def size(self) -> list[int]:
        """H and W of the queries."""
        return plain(self.q.shape[1:3])

    @property
    def pooled(self) -> list[int]:
        """H and W of the pooled keys."""
        return plain(self.pool_k.shape[1:3])

    @property
    def axes(self) -> tuple[Pooled, Pooled]:
        """The axes that the position bias is evaluated on."""
        h, w, ph, pw = self.bias_size or (*self.size, *self.pooled)
        return Pooled(h, ph), Pooled(w, pw)

    @property
    def dtype(self) -> torch.dtype:
        """In which logits and weights are made: float32 at least."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def scale(self) -> Tensor:
        """[N] softplus(temperature)"""
        return F.softplus(self.temperature)

    def empty(self) -> Tensor | tuple[Tensor, Tensor]:
        out = self.pool_v.new_empty((*self.q.shape[:-1], self.pool_v.shape[-1]))
        lse = self.q.new_empty(self.q.shape[:-1], dtype=self.dtype)
        return (out, lse) if self.return_lse else out

    def flops(self) -> int:
        """Those of the pairs that take part, the learnable tokens and the bias of distinct distances."""
        b, h, w, n, d = self.q.shape
        pairs, tokens = h * w * self.pool_k.shape[1:3].numel(), 0
        if self.local_k is not None:
            pairs += _pairs(h, self.kernel_size) * _pairs(w, self.kernel_size)
        if self.tokens is not None:
            tokens = h * w * self.kernel_size**2 * d
        rows, columns = (len(axis.distances) for axis in self.axes)
        bias = rows * columns * self.cpb_weight1.shape[0] * (2 + n)
        return 2 * (b * n * (pairs * (d + self.v.shape[-1]) + tokens) + bias)


def _pairs(length: int, kernel_size: int) -> int:
    """Count the pairs of tokens of an axis that lie in one another's window."""
    reach = kernel_size // 2
    return sum(max(length - abs(step), 0) for step in range(-reach, reach + 1))


def _problem(
    q: Tensor, maps: Sequence[Any], parameters: Sequence[Any], *sizes: Any, return_lse: bool = False
) -> AggregatedProblem:
    """Normalise arguments; maps are (pool_k, pool_v, k, v), then the other tensors and the sizes in their order."""
    check_tensors(q=q)
    pool_k, pool_v, k, v = maps
    q, pool_k, pool_v, k, v = to_autocast(q, pool_k, pool_v, k, v)
    dtype = torch.promote_types(q.dtype, torch.float32)
    temperature, embedding, w1, b1, w2, b2, *local = (
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in parameters
    )
    pretrain, bias, kernel = sizes
    pretrain = per_axis("pretrain_size", pretrain, int, 2)
    bias = per_axis("bias_size", bias, int, len(bias))
    (kernel,) = per_axis("kernel_size", kernel, int, 1)
    how: Any = (w1, b1, w2, b2, pretrain, bias, k, v, kernel, *local, return_lse)
    return AggregatedProblem(q, pool_k, pool_v, temperature, embedding, *how)


_backends = Backends(
    "aggregated_attention",
    AggregatedProblem,
    triton.attend,
    eager.attend,
    reference.attend,
    can_run=triton.can_run,
    whole_on_cpu=True,
)


@overload
def aggregated_attention(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    cpb_weight1: Tensor,
    cpb_bias1: Tensor,
    cpb_weight2: Tensor,
    cpb_bias2: Tensor,
    pretrain_size: int | Sequence[int],
    bias_size: Sequence[int] = (),
    k: Tensor | None = None,
    v: Tensor | None = None,
    kernel_size: int = 3,
    local_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def aggregated_attention(
    *args: Any, return_lse: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...
@traced_as_one
def aggregated_attention(
    q: Tensor,
    pool_k: Tensor,
    pool_v: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    cpb_weight1: Tensor,
    cpb_bias1: Tensor,
    cpb_weight2: Tensor,
    cpb_bias2: Tensor,
    pretrain_size: int | Sequence[int],
    bias_size: Sequence[int] = (),
    k: Tensor | None = None,
    v: Tensor | None = None,
    kernel_size: int = 3,
    local_bias: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q' [k_local, pool_k]^T + bias) [v_local, pool_v], with one softmax over neighbours and pooled keys.

    q, k and pool_k are normalised to length 1 here. q' = (q + query_embedding) * softplus(temperature) * log(number of
    keys that the query sees). The bias of pooled keys is a perceptron of the logarithm of their distance, that of
    neighbours a table. The weights of neighbours are then increased by q tokens + token_bias. Differentiable in every
    tensor.

    Args:
        q: Queries [B, H, W, N, D]; N heads of D channels. Any strides.
        pool_k: Pooled keys [B, PH, PW, N, D], of bins of the map (`visattn.ops.avg_pool_grid`); 1 <= PH <= H and
            1 <= PW <= W. With PH = H and PW = W, and no k, this is attention to the whole map.
        pool_v: Pooled values [B, PH, PW, N, Dv].
        temperature: [N].
        query_embedding: [N, D].
        cpb_weight1: First layer of the position perceptron [F, 2], for (log-distance of rows, of columns).
        cpb_bias1: [F].
        cpb_weight2: Its second layer [N, F], after a ReLU.
        cpb_bias2: [N].
        pretrain_size: Tokens of the map per axis at which a distance across the whole map counts as 8; 1 is taken as 2.
        bias_size: [] evaluates the position bias at the sizes of q and pool_k (extrapolation). [H0, W0, PH0, PW0]:
            evaluates it at these and interpolates bilinearly.
        k: Keys [B, H, W, N, D] of the neighbours; None: queries see the pooled keys alone.
        v: Values [B, H, W, N, Dv] of the neighbours.
        kernel_size: Neighbours per axis, odd; those outside the map do not exist.
        local_bias: Added to the logits of neighbours [N, K * K], row by row.
        tokens: Learnable tokens [N, D, K * K]: q tokens, with q of length 1, is added to the weights of neighbours.
        token_bias: [N, K * K], added to the weights of neighbours.
        return_lse: Also return the natural log of the sum of the exponentials of the logits.
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, Dv] of pool_v's dtype; under autocast of its dtype, to which q, keys and values are cast.
        With `return_lse` also [B, H, W, N], float32 (float64 for float64).

    Raises:
        ValueError: Shapes or sizes that do not fit.
        TypeError: q, keys and values of different dtypes, or tensors that are not floating point. Parameters may have
            another floating dtype.
        BackendError: The requested backend cannot run this call.

    Source: TransNeXt (arXiv:2311.17132), section 3.1.
    """
    cpb = (cpb_weight1, cpb_bias1, cpb_weight2, cpb_bias2)
    parameters = (temperature, query_embedding, *cpb, local_bias, tokens, token_bias)
    maps, sizes = (pool_k, pool_v, k, v), (pretrain_size, bias_size, kernel_size)
    problem = _problem(q, maps, parameters, *sizes, return_lse=return_lse)
    with without_autocast(q.device):
        return _backends.choose(problem, backend)(problem)


def aggregated_weights(
    q: Tensor,
    pool_k: Tensor,
    temperature: Tensor,
    query_embedding: Tensor,
    cpb_weight1: Tensor,
    cpb_bias1: Tensor,
    cpb_weight2: Tensor,
    cpb_bias2: Tensor,
    pretrain_size: int | Sequence[int],
    bias_size: Sequence[int] = (),
    k: Tensor | None = None,
    kernel_size: int = 3,
    local_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """What the softmax of `aggregated_attention` gives to each key, for looking at; all of it in memory at once.

    Args: as in `aggregated_attention`.

    Returns:
        Weights of the neighbours [B, H, W, N, K * K] (None without k; 0 outside the map) and of the pooled keys
        [B, H, W, N, PH, PW], in float32 or float64; together they sum to 1.

    Raises:
        ValueError, TypeError: as in `aggregated_attention`.
    """
    cpb = (cpb_weight1, cpb_bias1, cpb_weight2, cpb_bias2)
    parameters = (temperature, query_embedding, *cpb, local_bias, None, None)
    problem = _problem(q, (pool_k, pool_k, k, k), parameters, pretrain_size, bias_size, kernel_size)
    with without_autocast(q.device):
        _, local, pooled, _ = reference.weights(problem)
    return local, pooled.unflatten(-1, problem.pooled)  # [B, H, W, N, PH, PW]
