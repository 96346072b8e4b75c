"""Modules with parameters, one idea per file."""

from visattn.layers.block import TransformerBlock
from visattn.layers.init import init_weights
from visattn.layers.neighborhood import GlobalAttention, NeighborhoodAttention
from visattn.layers.patch import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from visattn.layers.stage import Stage

__all__ = [
    "ConvDownsampler",
    "ConvTokenizer",
    "GlobalAttention",
    "NeighborhoodAttention",
    "PatchMerging",
    "PatchTokenizer",
    "Stage",
    "TransformerBlock",
    "init_weights",
]
