"""Randomness from counters: every draw follows from (seed, what for, where), so no generator state has to survive.

Workers, ranks and resumed runs draw what one uninterrupted process would have drawn at that place.
"""

import hashlib
import random

import numpy as np
import torch


def seed_everything(*counter: int | str) -> None:
    """Seed Python's, numpy's and torch's generators (on all devices) from a place in the run."""
    if torch.accelerator.is_available():
        _seed_python_and_numpy(torch.manual_seed, counter)
    else:
        seed_worker(*counter)  # the same, without asking a dozen kinds of devices


def seed_worker(*counter: int | str) -> None:
    """The same for code that draws on the CPU only, several times cheaper: once per image."""
    _seed_python_and_numpy(torch.default_generator.manual_seed, counter)


def seed_for(*counter: int | str) -> int:
    """A 63-bit seed from a place in the run."""
    text = "/".join(str(part) for part in counter)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _seed_python_and_numpy(seed_torch, counter: tuple[int | str, ...]) -> None:
    seed = seed_for(*counter)
    seed_torch(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  the generator that timm's mixup draws from
