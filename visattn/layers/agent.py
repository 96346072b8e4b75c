"""Agent attention as a token mixer."""

import math
from collections.abc import Callable

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.layers.conv import DepthwiseConv
from visattn.layers.token_mixer import Size, TokenMixer
from visattn.ops import adaptive_avg_pool, agent_attention, agent_position_bias

torch.fx.wrap("adaptive_avg_pool")
torch.fx.wrap("agent_attention")
torch.fx.wrap("agent_position_bias")


class AgentAttention(TokenMixer):
    """A few agents, averages of the queries, gather from all tokens; every token then reads from the agents.

    softmax(q a^T / sqrt(D) + B2) softmax(a k^T / sqrt(D) + B1) v + dwconv(v), then the output projection. The biases
    are tables of the map at `feat_size`, resized linearly to the map that comes in. Prefix tokens are queries, keys and
    values; agents are pooled from the map, and only the map is convolved.

    Shapes: [B, H, W, dim] -> [B, H, W, dim], or with `size` (H, W) given [B, P + H * W, dim] -> the same.

    Args:
        dim: Channels.
        num_heads: Heads.
        feat_size: Map (H, W) that the bias tables are made for; maps of any size may come in.
        num_prefix_tokens: P, tokens that come before those of the map.
        sr_ratio: Keys and values of a map reduced by this factor per axis; values are resized back for the convolution.
        qkv_bias: Bias of the query, key and value projections.
        proj_drop: Dropout after the output projection.
        num_agents: Agents that the bias tables are made for, a square.
        agent_size: Agents per axis (ph, pw) that are pooled, the tables being resized to them. Default: the square root
            of `num_agents`, for both.

    Raises:
        ValueError: What `TokenMixer` refuses, a number of agents that is not a square, or an `agent_size` below 1 or,
            with prefix tokens, of another number of agents.

    Source: Agent Attention (arXiv:2312.08874), section 4.
    """

    an_bias: nn.Parameter
    na_bias: nn.Parameter
    ah_bias: nn.Parameter
    aw_bias: nn.Parameter
    ha_bias: nn.Parameter
    wa_bias: nn.Parameter
    ac_bias: nn.Parameter | None
    ca_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feat_size: tuple[int, int],
        num_prefix_tokens: int = 0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        num_agents: int = 49,
        agent_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        how = (feat_size, num_prefix_tokens, sr_ratio, qkv_bias, proj_drop)
        super().__init__(dim, num_heads, *how, **dd)
        side = math.isqrt(max(num_agents, 0))
        if num_agents < 1 or side * side != num_agents:
            near = max(side, 1) ** 2
            raise ValueError(f"expected num_agents to be a square, got {num_agents}; try {near}")
        if agent_size is not None and (len(agent_size) != 2 or min(agent_size) < 1):
            raise ValueError(f"expected agent_size of 2 ints >= 1, got {agent_size}")
        if num_prefix_tokens and agent_size is not None and math.prod(agent_size) != num_agents:
            raise ValueError(
                f"expected agent_size of {num_agents} agents with prefix tokens, whose biases cannot be resized, got "
                f"{agent_size}; try agent_size=None"
            )
        self.num_agents = num_agents
        self.agent_size = [side, side] if agent_size is None else list(agent_size)
        (h, w), (kh, kw) = feat_size, (max(1, n // sr_ratio) for n in feat_size)
        shapes = {
            "an_bias": (num_heads, num_agents, 7, 7),
            "na_bias": (num_heads, num_agents, 7, 7),
            "ah_bias": (1, num_heads, num_agents, kh, 1),
            "aw_bias": (1, num_heads, num_agents, 1, kw),
            "ha_bias": (1, num_heads, h, 1, num_agents),
            "wa_bias": (1, num_heads, 1, w, num_agents),
            "ac_bias": (1, num_heads, num_agents, num_prefix_tokens) if num_prefix_tokens else None,
            "ca_bias": (1, num_heads, num_prefix_tokens, num_agents) if num_prefix_tokens else None,
        }
        for name, shape in shapes.items():
            bias = None if shape is None else nn.Parameter(torch.empty(shape, **dd))
            self.register_parameter(name, bias)
        self.dwc = DepthwiseConv(dim, 3, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal (std 0.02) for the bias tables."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(parameter, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AgentAttention":
        """As for any module; tables of five axes, which no memory format of images fits, give `fn` all but the first.

        `Module.to(memory_format=torch.channels_last)` would raise.
        """
        return super()._apply(lambda t: fn(t[0])[None] if t.ndim == 5 else fn(t), recurse)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, kv_size: Size) -> Tensor:
        agents = adaptive_avg_pool(self._map(q, size), self.agent_size)  # [B, ph, pw, C]
        (agents,) = self._split(agents.flatten(1, 2), 1)  # [B, A, N, D]
        rows, columns = self.ah_bias[0, :, :, :, 0], self.aw_bias[0, :, :, 0]  # [N, A, H or W]
        agent_bias = agent_position_bias(self.an_bias, rows, columns, kv_size, self.agent_size)
        rows, columns = self.ha_bias[0, :, :, 0].mT, self.wa_bias[0, :, 0].mT
        query_bias = agent_position_bias(self.na_bias, rows, columns, size, self.agent_size)
        query_bias = query_bias.mT  # [N, L, A]; agent_bias [N, A, M]
        if self.ac_bias is not None and self.ca_bias is not None:
            agent_bias = torch.cat([self.ac_bias[0], agent_bias], 2)
            query_bias = torch.cat([self.ca_bias[0], query_bias], 1)
        biases = {"agent_bias": agent_bias, "query_bias": query_bias}
        x = agent_attention(q, k, v, agents, **biases, scale=self.scale)
        v = self._map(v, kv_size)
        if self.sr is not None:
            v = F.interpolate(v.permute(0, 3, 1, 2), size, mode="bilinear")  # [B, C, H, W]
            v = v.permute(0, 2, 3, 1)  # [B, H, W, C]
        return self._add_to_map(x, self.dwc(v))

    def extra_repr(self) -> str:
        agents = f"num_agents={self.num_agents}, agent_size={tuple(self.agent_size)}"
        return f"{super().extra_repr()}, {agents}"
