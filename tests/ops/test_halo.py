"""Halo attention: backends against the reference and the goldens of two public implementations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.golden import fill
from tests.ops.gradients import Recorder, check, leaves
from tests.tolerances import relative_error
from visattn.ops import chunking, halo_attention
from visattn.ops.geometry import Halo

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "op_halo.npz")
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


def golden(case, shape):
    """Parameters, input and cotangent of a golden case, in float64; parameters and input require gradients."""
    grads = {k.removeprefix(f"{case}_g_"): GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{case}_g_")}
    parameters = {k: v.double() for k, v in fill.fill({k: g.shape for k, g in grads.items()}).items()}
    parameters["x"], grads["x"] = fill.image(shape, 0).double(), GOLDEN[f"{case}_gx"]
    return {k: v.requires_grad_() for k, v in parameters.items()}, grads


def check_golden(case, out, parameters, grads):
    assert relative_error(out, torch.from_numpy(GOLDEN[f"{case}_y"])) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(fill.image(tuple(out.shape), 1).double())
    for name, grad in grads.items():
        assert relative_error(parameters[name].grad, torch.from_numpy(grad)) <= tolerances.OP_GOLDEN_GRADIENT, name


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_masked_border(backend, case):
    """halonet-pytorch: borders masked; the relative term is scaled too."""
    case = f"lucid_{case}"
    _, block, halo, dim, heads, *shape = GOLDEN[f"{case}_cfg"].tolist()
    p, grads = golden(case, shape)
    x = p["x"].permute(0, 2, 3, 1)
    q, k, v = F.linear(x, torch.cat([p["to_q.weight"], p["to_kv.weight"]])).unflatten(-1, (3, heads, dim)).unbind(3)
    rel = (p[f"rel_pos_emb.rel_{axis}"] * dim**-0.5 for axis in ("height", "width"))
    out = halo_attention(q, k, v, block, halo, 1, *rel, backend=backend).flatten(3)
    out = F.linear(out, p["to_out.weight"], p["to_out.bias"]).permute(0, 3, 1, 2)
    check_golden(case, out, p, grads)


@pytest.mark.parametrize(
    ("case", "shape"),
    [("s1", (2, 16, 8, 12)), ("s2", (1, 16, 16, 24)), ("s2pool", (1, 16, 14, 14)), ("h8", (1, 32, 16, 16)),
     ("scaled", (1, 16, 8, 8))],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_unmasked_border(backend, case, shape):
    """timm's HaloAttn: keys outside the map take part as zeros; keys and values interleaved by head."""
    case = f"timm_{case}"
    cfg = json.loads(str(GOLDEN[f"{case}_cfg_json"]))
    p, grads = golden(case, shape)
    heads, stride, block = cfg["num_heads"], cfg.get("stride", 1), cfg["block_size"]
    pool = stride > 1 and block % stride != 0
    dim = p["pos_embed.height_rel"].shape[1]
    x = p["x"].permute(0, 2, 3, 1)
    step = 1 if pool else stride
    q = F.linear(x[:, ::step, ::step], p["q.weight"].flatten(1)).unflatten(-1, (heads, dim))
    k, v = F.linear(x, p["kv.weight"].flatten(1)).unflatten(-1, (heads, -1)).tensor_split([dim], dim=-1)
    factor = dim**-0.5 if cfg.get("scale_pos_embed") else 1
    rel = (p[f"pos_embed.{axis}_rel"] * factor for axis in ("height", "width"))
    out = halo_attention(q, k, v, block, cfg["halo_size"], step, *rel, mask_border=False, backend=backend)
    out = out.flatten(3).permute(0, 3, 1, 2)
    check_golden(case, F.avg_pool2d(out, 2) if pool else out, p, grads)


PLAIN = (
    {"q": (2, 19, 10, 2, 24), "k": (2, 19, 10, 2, 24), "v": (2, 19, 10, 2, 24), "rel_h": (27, 24), "rel_w": (27, 24)},
    {"block_size": 8, "halo_size": 3},
    True,
    0,
)


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    monkeypatch.setattr(chunking, "CHUNK", chunk)
    check(halo_attention, PLAIN, "eager")


def test_pairs_are_those_of_the_geometry():
    for length in range(1, 14):
        for block, halo, stride in ((4, 1, 1), (4, 3, 2), (6, 0, 3), (1, 2, 1)):
            axis = Halo(length, block, halo, stride)
            index = axis.key_index()[torch.arange(axis.queries) // axis.queries_per_block]
            assert axis.pairs(True) == ((index >= 0) & (index < length)).sum()
            assert axis.pairs(False) == index.numel()


@pytest.mark.parametrize("mask_border", [False, True])
@pytest.mark.parametrize(
    ("block", "halo", "stride"),
    [((1, 1000), 0, 1), ((1, 1000), (1, 5), 1), ((3, 2), (40, 300), 1), ((2, 1000), (1, 0), (1, 2)), (40, 30, (4, 5))],
)
@pytest.mark.parametrize("with_tables", [False, True])
def test_windows_larger_than_the_map_cost_no_more_than_it(with_tables, block, halo, stride, mask_border):
    """Slots that never hold a key are left out where they take no part, else counted without being made."""
    (bh, bw), (h, w), (sh, sw) = (x if isinstance(x, tuple) else (x, x) for x in (block, halo, stride))
    shapes = {"q": (2, -(-6 // sh), -(-5 // sw), 2, 4), "k": (2, 6, 5, 2, 4), "v": (2, 6, 5, 2, 3)}
    if with_tables:
        shapes |= {"rel_h": (2 * (bh + 2 * h) - 1, 4), "rel_w": (2 * (bw + 2 * w) - 1, 4)}
    call = {"block_size": (bh, bw), "halo_size": (h, w), "stride": (sh, sw), "mask_border": mask_border}
    check(halo_attention, (shapes, call, False, 0), "eager")
    with Recorder() as recorder:
        halo_attention(**leaves(shapes, 0), **call)
    # Every query against all slots of windows of the map's size, and what is linear in the window.
    assert recorder.largest <= 8 * 4 * (9 * 16 * 9 * 16 + 30 * 2 * (bh + bw + 2 * h + 2 * w))
