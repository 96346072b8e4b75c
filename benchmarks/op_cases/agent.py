"""Agent attention with its position biases against the official formulation, written from its description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from op_cases import MIXED, Attend, Case, Providers, round_up
from visattn.ops import agent_attention, agent_position_bias


def official_matmuls(case: Agent) -> Attend:
    """Biases resized, repeated over the batch term by term and added; agents and queries scaled; products, softmax."""
    scale = case.dim**-0.5

    def position(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        terms = F.interpolate(table, case.size, mode="bilinear"), rows[..., None] + columns[..., None, :]
        first, second = (term.flatten(2)[None].repeat(case.batch, 1, 1, 1) for term in terms)
        return first + second

    def attend(q: Tensor, *tensors: Tensor, **named: Tensor) -> Tensor:
        with case.mixed_precision(q.device):
            return formula(q, *tensors, **named)

    def formula(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, **tables: Tensor) -> Tensor:
        query, key, value = (x.flatten(1, 2).permute(0, 2, 1, 3) for x in (q, k, v))
        agents = agents.permute(0, 2, 1, 3)
        bias = position(tables["an"], tables["ah"], tables["aw"])
        gathered = ((agents * scale) @ key.transpose(-2, -1) + bias).softmax(dim=-1) @ value
        bias = position(tables["na"], tables["ha"], tables["wa"]).transpose(-2, -1)
        out = ((query * scale) @ agents.transpose(-2, -1) + bias).softmax(dim=-1) @ gathered
        return out.transpose(1, 2).reshape(q.shape)

    return attend


@dataclass(frozen=True)
class Agent(Case):
    """Attention by way of `agents` agents; the biases come from tables of the map's size, as the models keep them."""

    agents: int

    providers: ClassVar[Providers] = {"official matmuls": (official_matmuls, None)}
    cuda_providers: ClassVar[Providers] = providers
    maps: ClassVar[tuple[str, ...]] = ("q", "k", "v", "agents")

    def pairs(self) -> int:
        """Agents with all keys, and queries with all agents."""
        return 2 * self.tokens() * round_up(self.agents)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        lead, (h, w) = (self.heads, self.agents), self.size
        ends = {"an": (7, 7), "ah": (h,), "aw": (w,), "na": (7, 7), "ha": (h,), "wa": (w,)}
        agents = {"agents": (self.batch, self.agents, self.heads, self.dim)}
        return {**super().shapes(), **agents, **{name: (*lead, *end) for name, end in ends.items()}}

    def visattn(self, backend: str) -> Attend:
        grid = [math.isqrt(self.agents)] * 2

        def attend(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, **tables: Tensor) -> Tensor:
            agent_bias = agent_position_bias(tables["an"], tables["ah"], tables["aw"], self.size, grid)
            query_bias = agent_position_bias(tables["na"], tables["ha"], tables["wa"], self.size, grid).mT
            return agent_attention(q, k, v, agents, agent_bias, query_bias, backend=backend)

        return attend


# Agent-PVT's first stage; the stages of Agent-Swin-T and -B; 49 agents on a large map.
CASES = [
    Agent("agent_56_a9_d64", 8, (56, 56), 1, 64, 9),
    Agent("agent_56_a9", 8, (56, 56), 3, 32, 9),
    Agent("agent_28_a16", 8, (28, 28), 6, 32, 16),
    Agent("agent_14_a49", 8, (14, 14), 12, 32, 49),
    Agent("agent_56_a49", 8, (56, 56), 3, 32, 49),
]

# The stages of Agent-Swin-T at batch 128, and a detector's map of 800 x 1216.
CUDA_CASES = [
    Agent("agent_56_a9", 128, (56, 56), 3, 32, 9, **MIXED),
    Agent("agent_28_a16", 128, (28, 28), 6, 32, 16, **MIXED),
    Agent("agent_14_a49", 128, (14, 14), 12, 32, 49, **MIXED),
    Agent("agent_dense_200x304_a9", 2, (200, 304), 3, 32, 9, **MIXED),
]
TINY = [Agent("tiny_agent", 3, (8, 6), 2, 16, 9, fused=True)]
