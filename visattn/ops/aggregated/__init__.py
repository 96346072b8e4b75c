"""Aggregated attention: a token attends to its neighbours and to the pooled map. See README.md in this folder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visattn.ops.aggregated import op
from visattn.ops.checks import per_axis


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
    backend: str = "auto",
) -> Tensor:
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
        backend: "auto", "triton", "eager" or "reference". See `visattn.ops.use_backend` for other ways to choose.

    Returns:
        [B, H, W, N, Dv] of pool_v's dtype.

    Raises:
        ValueError: Shapes or sizes that do not fit.
        TypeError: q, keys and values of different dtypes, or not floating point. Parameters may have others.
        BackendError: The requested backend cannot run this call.

    Source: TransNeXt (arXiv:2311.17132), section 3.1.
    """
    return op.attend(
        q,
        pool_k,
        pool_v,
        temperature,
        query_embedding,
        cpb_weight1,
        cpb_bias1,
        cpb_weight2,
        cpb_bias2,
        per_axis("pretrain_size", pretrain_size, int, 2),
        list(bias_size),
        k,
        v,
        kernel_size,
        local_bias,
        tokens,
        token_bias,
        backend,
    )


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
    size = per_axis("pretrain_size", pretrain_size, int, 2)
    return op.aggregated_weights(
        q, pool_k, temperature, query_embedding, cpb, size, list(bias_size), k, kernel_size, local_bias
    )
