"""Shared by the layers' tests: cases of official modules, random parameters, all gradients beside a definition's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tolerances import OP, relative_error

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_cases(*files):
    """Parametrises by the official modules in `op_{file}.npz`: file, prefix of the case's arrays, its arguments."""
    cases = []
    for file in files:
        meta = json.loads(str(np.load(GOLDEN / f"op_{file}.npz")["meta"]))
        cases += [pytest.param(file, f"c{i}.", case, id=f"{file}-{i}") for i, case in enumerate(meta["cases"])]
    return pytest.mark.parametrize(("file", "prefix", "case"), cases)


def golden_arrays(file, prefix):
    """{name: tensor in float64} of a case."""
    arrays = np.load(GOLDEN / f"op_{file}.npz").items()
    return {k.removeprefix(prefix): torch.from_numpy(v).double() for k, v in arrays if k.startswith(prefix)}


def randomized(module, std=1.0):
    """The layer with parameters that all matter."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def assert_same_with_gradients(out, expected, inputs):
    """Two results, and all gradients through them, in float64."""
    results = [[x, *torch.autograd.grad(x.square().sum(), inputs)] for x in (out, expected)]
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= OP[torch.float64]
