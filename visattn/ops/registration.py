"""Registers visattn's ops with the PyTorch dispatcher as `torch.ops.visattn.<name>`.

Called through `torch.ops`, an op is a single node for fx tracing and TorchScript, while autograd, the meta device,
`torch.compile` and `torch.export` see through a composite op to the PyTorch operations inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("visattn", "DEF")


def composite(schema: str, fn: Callable[..., Any]) -> Any:
    """Define op `schema` with the differentiable Python implementation `fn`; returns its `torch.ops` entry."""
    name = _library.define(schema)
    _library.impl(name, fn, "CompositeImplicitAutograd")
    return getattr(torch.ops.visattn, name.rpartition("::")[2])
