"""The attention layers that models choose by name."""

import reprlib
from typing import Any

from visattn.layers.agent import AgentAttention
from visattn.layers.efficient import EfficientAttention
from visattn.layers.flow import FlowAttention
from visattn.layers.focused import FocusedLinearAttention
from visattn.layers.inline import InLineAttention
from visattn.layers.relu_linear import ReluLinearAttention
from visattn.layers.token_mixer import SoftmaxAttention, TokenMixer

TOKEN_MIXERS = {
    "softmax": SoftmaxAttention,
    "agent": AgentAttention,
    "inline": InLineAttention,
    "focused": FocusedLinearAttention,
    "efficient": EfficientAttention,
    "relu_linear": ReluLinearAttention,
    "flow": FlowAttention,
}


def create_token_mixer(
    attention: str, dim: int, num_heads: int, feat_size: tuple[int, int], **args: Any
) -> TokenMixer:
    """The attention layer called `attention`; further arguments are those of `TokenMixer` and of the layer itself.

    Raises:
        ValueError: Another name, or arguments that the layer refuses.
        TypeError: Arguments that the layer does not have.
    """
    if attention not in TOKEN_MIXERS:
        names = ", ".join(map(repr, TOKEN_MIXERS))
        raise ValueError(f"expected attention of {names}, got {reprlib.repr(attention):.80}")
    return TOKEN_MIXERS[attention](dim, num_heads, feat_size, **args)
