"""Shared by the models' tests: golden files (see tests/golden/README.md), official weights and the levels' sizes."""

import functools
import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

from tests.golden import fill
from tests.tolerances import MODEL_GOLDEN, relative_error
from visattn.ops.geometry import ceil_div

GOLDEN = Path(__file__).parents[1] / "golden"
ENDS = {"stage_first8": slice(8), "stage_first16": slice(16), "stage_last16": slice(-16, None)}


@functools.cache
def without_values(name):
    """The model on the meta device, to look at and not to change."""
    return timm.create_model(name, device="meta")


def number_of_parameters(name):
    return sum(p.numel() for p in without_values(name).parameters())


def load(name):
    """The golden file of this name."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def cases(golden):
    """The golden's inputs that the official code takes."""
    if "runs" in golden:
        return [run for run in golden["runs"] if run["ok"]]
    others = *golden.get("other_inputs", ()), alt_input(golden)
    return [golden, *(case for case in others if {"logits", "stage_norms"} & case.keys())]


def alt_input(golden):
    """The golden's one other input, in files that have it as "alt", where others have milder weights."""
    return golden["alt"] if "input" in golden.get("alt", ()) else {}


def passes(golden):
    """Official weights, and the golden's inputs with them."""
    weights = official_weights(golden)
    yield weights, cases(golden)
    if "alt" in golden and not alt_input(golden):
        weights = {key: value * (0.1 if "pos_embed" in key else 1) for key, value in weights.items()}
        yield weights, [{**golden["alt"], **{key: golden[key] for key in ("input", "stage_shapes")}}]


def detector(weights):
    """The weights as a detector's or segmenter's file has those of its backbone."""
    return {
        "state_dict": {**{f"backbone.{key}": value for key, value in weights.items()}, "neck.weight": torch.ones(1)}
    }


def official_weights(golden):
    """A state dict as the official model's, integer buffers included, but for what is computed from its settings."""
    keys = {key: shape for key, shape in golden["keys"].items() if key not in golden["computed"]}
    return {**fill.fill(keys, golden.get("salt", "")), **dict.fromkeys(golden["skip"], torch.tensor(0))}


def in_transformers(weights, base="dinat"):
    """The official weights of a DiNAT or NAT under the names that they have in transformers' classifiers."""
    names = [
        ("patch_embed.proj", f"{base}.embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", f"{base}.embeddings.norm"),
        ("levels.", f"{base}.encoder.levels."),
        (".blocks.", ".layers."),
        (".attn.proj.", ".attention.output.dense."),
        (".attn.", ".attention.self."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".gamma1", ".layer_scale_parameters"),
        ("head.", "classifier."),
    ]
    renamed = {}
    for key, value in weights.items():
        if key.endswith(".gamma1"):
            value = torch.stack([value, weights[key.replace("gamma1", "gamma2")]])  # [2, C]
        for old, new in names:
            key = key.replace(old, new)
        key = f"{base}.layernorm.{key[5:]}" if key.startswith("norm.") else key
        if ".qkv." in key:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[key.replace("qkv", part)] = chunk
        elif not key.endswith(".gamma2"):
            renamed[key] = value
    return renamed


def filter_fn(model):
    """The `checkpoint_filter_fn` of the model's family."""
    return importlib.import_module(type(model).__module__).checkpoint_filter_fn


def load_official(model, golden, weights=None):
    """Give the model the golden's weights and statistics, those of a dense backbone as detectors' files have them; it
    has as many parameters as the official one."""
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    weights = official_weights(golden) if weights is None else weights
    model.load_state_dict(filter_fn(model)(detector(weights) if "runs" in golden else weights, model))


def last(model, image):
    """Features and the maps of the four stages."""
    features, maps = model.forward_intermediates(image)
    return features, maps[-4:]


def without_context(model, image):
    """Features and the maps of OverLoCK, the third without the context behind its own channels."""
    features, maps = model.forward_intermediates(image)
    maps[2] = maps[2][:, : -model.context_dim]
    return features, maps


def normed(model, image):
    """Features and the maps of the stages, normed."""
    return model.forward_intermediates(image, norm=True)


def every_third(model, image):
    """Features and the maps of every third of twelve blocks."""
    features, maps = model.forward_intermediates(image)
    return features, [maps[i] for i in (2, 5, 8, 11)]


def quarters(model, image):
    """Features and the maps of the blocks at the end of each quarter."""
    features, maps = model.forward_intermediates(image)
    return features, maps[len(maps) // 4 - 1 :: len(maps) // 4]


def final(model, image):
    """Features and the last map."""
    features, maps = model.forward_intermediates(image, 1)
    return features, maps


def tokens(model, image):
    """Features and the tokens of every third of twelve blocks, the class token first."""
    args = {"return_prefix_tokens": True, "output_fmt": "NLC"}
    features, levels = model.forward_intermediates(image, [2, 5, 8], **args)
    return features, [*(torch.cat([token, level], 1) for level, token in levels), features]


def late_token(model, image):
    """As `tokens`, where the class token joins late; the last ones before the norm."""
    taken = dict.fromkeys((2, 5, 8, 11))
    return model.forward_features(image, taken=taken), list(taken.values())


def extracted(model, image):
    """No features, and what a feature extractor gives."""
    return None, model(image)


@torch.no_grad()
def check_case(model, case, run=last):
    """Logits, and norms, shapes and ends of the stages, as the golden has them; three axes there: tokens of a square
    map. Some files name every stage several times in a row."""
    given = case.get("input", {"shape": case.get("shape")})
    features, maps = run(model, fill.image(**given))
    if "logits" in case:
        logits = model.forward_head(features)
        head = torch.tensor(case["logits"])
        assert relative_error(logits[0, : len(head)], head) <= MODEL_GOLDEN
        assert logits.norm().item() == pytest.approx(case["logits_norm"], rel=MODEL_GOLDEN)
    if "stage_norms" not in case:
        return
    stages = [stage for stage in maps for _ in range(len(case["stage_norms"]) // len(maps))]
    for i, (stage, norm, shape) in enumerate(zip(stages, case["stage_norms"], case["stage_shapes"], strict=True)):
        if stage.ndim == 4 and len(shape) == 3:
            assert stage.shape[2] == stage.shape[3]
            stage = stage.flatten(2).mT
        assert list(stage.shape) == shape
        assert stage.double().norm().item() == pytest.approx(norm, rel=MODEL_GOLDEN)
        for key, cut in ENDS.items():
            if key in case:
                assert relative_error(stage.flatten()[cut], torch.tensor(case[key][i])) <= MODEL_GOLDEN


def check_native_keys_pass(name):
    """The family's filter leaves a state dict of our own alone, in any order, with and without the classifier."""
    model = without_values(name)
    state = dict(reversed(model.state_dict().items()))
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    for own in (state, headless):
        converted = filter_fn(model)(own, model)
        assert converted.keys() == own.keys()
        assert all(value is own[key] for key, value in converted.items())


@torch.inference_mode()
def check_levels(extractor, image, number=ceil_div):
    """Every level of the features has number(size, stride) tokens per axis, its channels, and finite values."""
    info, size = extractor.feature_info, image.shape[2:]
    for level, channels, stride in zip(extractor.eval()(image), info.channels(), info.reduction(), strict=True):
        assert level.shape == (len(image), channels, *(number(n, stride) for n in size)), (size, stride)
        assert level.isfinite().all(), (size, stride)
