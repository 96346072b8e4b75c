"""Aggregated attention against the official code, projections included."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import tolerances
from tests.tolerances import relative_error
from visattn.ops import aggregated_attention
from visattn.ops.aggregated.eager import _Layout
from visattn.ops.aggregated.reference import log_coordinates, neighbours, visible
from visattn.ops.geometry import Pooled

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = [f"op_{n}" for n in ("aggregated_attention_0", "aggregated_attention_2", "aggregated_attention_4",
         "aggregated_attention_dense_0", "aggregated_attention_dense_2", "transnext_attention")]  # fmt: skip
FILES = {name: np.load(FOLDER / f"{name}.npz") for name in NAMES}
CASES = [(name, i) for name in NAMES for i in range(len(json.loads(str(FILES[name]["meta"]))["cases"]))]
BACKENDS = ["eager", "reference"]  # Triton has tests of its own: no float64


def load(name, i):
    """A case's configuration, parameters and arrays by their names; the parameters require gradients."""
    file, prefix = FILES[name], f"c{i}."
    arrays = {n.removeprefix(prefix): torch.from_numpy(file[n]).double() for n in file.files if n.startswith(prefix)}
    parameters = {n.removeprefix("param."): t.requires_grad_() for n, t in arrays.items() if n.startswith("param.")}
    return json.loads(str(file["meta"]))["cases"][i], parameters, arrays


def pooled_size(case):
    return case.get("pool") or [n // case.get("sr_ratio", 1) for n in case["hw"]]


@pytest.mark.parametrize(("name", "i"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend, name, i):
    case, p, arrays = load(name, i)
    x = arrays["in0"].requires_grad_()
    image = x.unflatten(1, case["hw"])
    cpb = [p[f"cpb_fc{j}.{part}"] for j in (1, 2) for part in ("weight", "bias")]
    bias_size = []
    if not case.get("is_extrapolation", True):
        bias_size = [*case["trained_hw"], *(n // case["sr_ratio"] for n in case["trained_hw"])]
    sizes = (case["pretrain_size"] or case["hw"], bias_size)
    shared = (p["temperature"].flatten(), p["query_embedding"].flatten(1), *cpb, *sizes)
    heads = case["num_heads"]
    if "qkv.weight" in p:  # the last stage: every token is a pooled key
        q, k, v = F.linear(image, p["qkv.weight"], p["qkv.bias"]).unflatten(-1, (3, heads, -1)).unbind(3)
        out = aggregated_attention(q, k, v, *shared, backend=backend)
    else:
        pooled = F.gelu(F.linear(image, p["sr.weight"].flatten(1), p["sr.bias"])).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(pooled, pooled_size(case)).permute(0, 2, 3, 1)
        pooled = F.layer_norm(pooled, pooled.shape[-1:], p["norm.weight"], p["norm.bias"])
        q = F.linear(image, p["q.weight"], p["q.bias"]).unflatten(-1, (heads, -1))
        (k, v), (pool_k, pool_v) = (
            F.linear(t, p["kv.weight"], p["kv.bias"]).unflatten(-1, (2, heads, -1)).unbind(3) for t in (image, pooled)
        )
        local = (p["relative_pos_bias_local"], p["learnable_tokens"], p["learnable_bias"].flatten(1))
        out = aggregated_attention(
            q, pool_k, pool_v, *shared, k, v, case.get("window_size", 3), *local, backend=backend
        )
    out = F.linear(out.flatten(3).flatten(1, 2), p["proj.weight"], p["proj.bias"])
    assert relative_error(out, arrays["out"]) <= tolerances.OP_GOLDEN_FORWARD
    out.backward(arrays["grad_out"])
    assert relative_error(x.grad, arrays["grad_in0"]) <= tolerances.OP_GOLDEN_GRADIENT
    for n, t in p.items():
        expected = arrays[f"pgrad.{n}"]
        # What is added to all logits alike has a gradient of zero but for rounding: absolute there.
        close = (t.grad - expected).norm() <= 1e-12
        assert close or relative_error(t.grad, expected) <= tolerances.OP_GOLDEN_GRADIENT, n


@pytest.mark.parametrize(("name", "i"), [case for case in CASES if f"c{case[1]}.coords" in FILES[case[0]].files])
def test_coordinates_and_length_scale(name, i):
    case, _, arrays = load(name, i)
    size, pool = case["hw"], pooled_size(case)
    rows, columns = (
        log_coordinates(axis, n, torch.float64, torch.device("cpu"))[axis.index()]
        for axis, n in zip(map(Pooled, size, pool), case["pretrain_size"] or size, strict=True)
    )
    shape = (*size, *pool)
    pairs = torch.stack([rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)], dim=-1)
    assert relative_error(pairs.flatten(2, 3).flatten(0, 1), arrays["coords"]) <= tolerances.OP_GOLDEN_FORWARD
    if "seq_length_scale" in arrays:
        counts = visible(size, case["window_size"]).sum(-1) + pool[0] * pool[1]
        assert relative_error(counts.log().flatten(), arrays["seq_length_scale"][:, 0]) <= tolerances.OP_GOLDEN_FORWARD


def reference_pieces(size):
    """Logits and values of neighbours, and where there are none, as the reference makes them."""

    def logits(q, k):
        return torch.einsum("bhwnd,bhwjnd->bhwnj", q, neighbours(k, 3))

    def mix(w, v):
        return torch.einsum("bhwnj,bhwjnd->bhwnd", w, neighbours(v, 3))

    return logits, mix, visible(size, 3)[:, :, None]


def eager_pieces(size):
    layout, rows, dtype = _Layout(size, 3), slice(0, size[0]), torch.float64

    def logits(q, k):
        q, keys = layout.rows(q, dtype), layout.neighbours(layout.line(k, dtype), rows)
        return layout.map(torch.stack([(q * key).sum(2) for key in keys], dim=2))

    def mix(w, v):
        weights, values = layout.rows(w, dtype).unbind(2), layout.neighbours(layout.line(v, dtype), rows)
        return layout.map(sum(w[:, :, None] * value for w, value in zip(weights, values, strict=True)))

    outside = layout.outside(None)[None, None]
    return logits, mix, ~layout.map(outside)[0]


@pytest.mark.parametrize("pieces", [reference_pieces, eager_pieces])
def test_golden_sliding_window(pieces):
    """The two operators of the official CUDA extension: products with keys of neighbours, sums of their values."""
    file = np.load(FOLDER / "op_sliding_window_0.npz")
    size = json.loads(str(file["meta"]))["cases"][0]["hw"]
    arrays = {n.removeprefix("c0."): torch.from_numpy(file[n]) for n in file.files if n != "meta"}
    maps = {n: t.transpose(1, 2).unflatten(1, size) for n, t in arrays.items() if t.ndim == 4}
    logits, mix, inside = pieces(tuple(size))

    q, k, v, w, rpb = (t.clone().requires_grad_() for t in (*(maps[n] for n in "qkvw"), arrays["rpb"]))
    attn = logits(q, k) + rpb
    assert (maps["attn"].isinf() == ~inside).all()
    assert relative_error(attn.where(inside, 0), maps["attn"].where(inside, 0)) <= tolerances.OP_GOLDEN_FORWARD
    out = mix(w, v)
    assert relative_error(out, maps["out"]) <= tolerances.OP_GOLDEN_FORWARD
    grads = torch.autograd.grad([attn, out], [q, k, v, w, rpb], [maps["g_attn"].where(inside, 0), maps["g_out"]])
    expected = (*(maps[f"d{n}"] for n in "qkvw"), arrays["drpb"])
    for got, grad in zip(grads, expected, strict=True):
        assert relative_error(got, grad) <= tolerances.OP_GOLDEN_GRADIENT
