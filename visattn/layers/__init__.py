"""Modules with parameters, one idea per file."""

from visattn.layers.block import TransformerBlock
from visattn.layers.conv import ConvNorm
from visattn.layers.halo import HaloAttention
from visattn.layers.init import init_weights
from visattn.layers.mbconv import ConvStem, MBConv, create_pool
from visattn.layers.neighborhood import GlobalAttention, NeighborhoodAttention
from visattn.layers.patch import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from visattn.layers.rel_attention import LogRelPos, PooledTransformerBlock
from visattn.layers.split_attention import SplAt
from visattn.layers.stage import Stage
from visattn.layers.window import WindowAttention

__all__ = [
    "ConvDownsampler",
    "ConvNorm",
    "ConvStem",
    "ConvTokenizer",
    "GlobalAttention",
    "HaloAttention",
    "LogRelPos",
    "MBConv",
    "NeighborhoodAttention",
    "PatchMerging",
    "PatchTokenizer",
    "PooledTransformerBlock",
    "SplAt",
    "Stage",
    "TransformerBlock",
    "WindowAttention",
    "create_pool",
    "init_weights",
]
