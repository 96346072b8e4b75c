"""Deterministic parameters for parity checks: the value of each entry depends on its name and shape alone.

A golden file needs no weights: it stores the reference implementation's state-dict keys and
shapes, a seed for the input, and what the reference gave. Anyone can rebuild the same
state dict with `fill` and compare.
"""

from __future__ import annotations
import zlib
import numpy as np
import torch


def tensor_for(key: str, shape, salt: str = "") -> torch.Tensor:
    """float32 tensor for entry `key` of `shape`; stable across torch and numpy releases."""
    shape = tuple(int(s) for s in shape)
    rng = np.random.RandomState(zlib.crc32((salt + key).encode()) & 0x7FFFFFFF)
    x = rng.standard_normal(shape if shape else (1,)).astype(np.float32).reshape(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        x = 1.0 + 0.2 * np.abs(x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        x = x / np.sqrt(max(fan_in, 1))
    elif leaf == "weight" or "gamma" in leaf or "layer_scale" in key or leaf == "temperature":
        x = 1.0 + 0.1 * x
    else:
        x = 0.1 * x
    return torch.from_numpy(np.ascontiguousarray(x))


def fill(shapes: dict, salt: str = "") -> dict:
    """State dict for `{key: shape}` (floating entries only; leave integer buffers to the module)."""
    return {k: tensor_for(k, s, salt) for k, s in shapes.items()}


def image(shape=(1, 3, 224, 224), seed: int = 0) -> torch.Tensor:
    """Seeded standard-normal input, NCHW float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
