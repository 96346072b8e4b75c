"""Modules with parameters, one idea per file."""

from visattn.layers.agent import AgentAttention
from visattn.layers.aggregated import AggregatedAttention, CosineAttention
from visattn.layers.block import TokenTransformerBlock, TransformerBlock
from visattn.layers.class_attention import ClassAttention, ClassAttentionBlock
from visattn.layers.context_mix import ContextMix, ContMixBlock
from visattn.layers.conv import (
    ChannelScale,
    ConvNorm,
    DepthwiseConv,
    ResDWConv,
    create_act,
    dilate_convs,
)
from visattn.layers.conv_glu import ConvGLU
from visattn.layers.conv_mlp import ConvMlp, GlobalResponseNorm
from visattn.layers.create import TOKEN_MIXERS, create_token_mixer
from visattn.layers.dilated_reparam import DilatedReparam
from visattn.layers.efficient import EfficientAttention, EfficientAttention2d
from visattn.layers.flow import FlowAttention
from visattn.layers.focused import FocusedLinearAttention
from visattn.layers.gated_positional import GatedPositionalAttention
from visattn.layers.halo import HaloAttention
from visattn.layers.init import init_weights, reset_parameters
from visattn.layers.inline import InLineAttention
from visattn.layers.lepe import LePEAttention
from visattn.layers.mbconv import ConvStem, MBConv
from visattn.layers.neighborhood import GlobalAttention, NeighborhoodAttention
from visattn.layers.patch import (
    ConvDownsampler,
    ConvTokenizer,
    PatchConv,
    PatchMerging,
    PatchTokenizer,
    PositionedTokenizer,
)
from visattn.layers.pool import create_pool
from visattn.layers.rel_attention import LogRelPos, PooledTransformerBlock
from visattn.layers.relu_linear import LocalConcentration, ReluLinearAttention
from visattn.layers.routing import BiLevelRoutingAttention
from visattn.layers.shifted_window import ShiftedWindowAttention
from visattn.layers.split_attention import SplAt
from visattn.layers.stage import Stage
from visattn.layers.stripe import CrossShapedAttention
from visattn.layers.token_mixer import SoftmaxAttention, TokenMixer
from visattn.layers.window import WindowAttention

__all__ = [
    "TOKEN_MIXERS",
    "AgentAttention",
    "AggregatedAttention",
    "BiLevelRoutingAttention",
    "ChannelScale",
    "ClassAttention",
    "ClassAttentionBlock",
    "ContMixBlock",
    "ContextMix",
    "ConvDownsampler",
    "ConvGLU",
    "ConvMlp",
    "ConvNorm",
    "ConvStem",
    "ConvTokenizer",
    "CosineAttention",
    "CrossShapedAttention",
    "DepthwiseConv",
    "DilatedReparam",
    "EfficientAttention",
    "EfficientAttention2d",
    "FlowAttention",
    "FocusedLinearAttention",
    "GatedPositionalAttention",
    "GlobalAttention",
    "GlobalResponseNorm",
    "HaloAttention",
    "InLineAttention",
    "LePEAttention",
    "LocalConcentration",
    "LogRelPos",
    "MBConv",
    "NeighborhoodAttention",
    "PatchConv",
    "PatchMerging",
    "PatchTokenizer",
    "PooledTransformerBlock",
    "PositionedTokenizer",
    "ReluLinearAttention",
    "ResDWConv",
    "ShiftedWindowAttention",
    "SoftmaxAttention",
    "SplAt",
    "Stage",
    "TokenMixer",
    "TokenTransformerBlock",
    "TransformerBlock",
    "WindowAttention",
    "create_act",
    "create_pool",
    "create_token_mixer",
    "dilate_convs",
    "init_weights",
    "reset_parameters",
]
