"""Shared by the models' tests: golden files (see tests/golden/README.md), official weights and the levels' sizes."""

import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

from tests.golden import fill
from tests.tolerances import MODEL_GOLDEN, relative_error

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    """The golden file of this name."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def cases(golden):
    """The golden's inputs that the official code takes."""
    return [golden, *(case for case in golden.get("other_inputs", ()) if "logits" in case)]


def official_weights(golden):
    """A state dict as the official model's, integer buffers included, but for what is computed from its settings."""
    keys = {key: shape for key, shape in golden["keys"].items() if key not in golden["computed"]}
    return {**fill.fill(keys, golden.get("salt", "")), **dict.fromkeys(golden["skip"], torch.tensor(0))}


def filter_fn(model):
    """The `checkpoint_filter_fn` of the model's family."""
    return importlib.import_module(type(model).__module__).checkpoint_filter_fn


def load_official(model, golden):
    """Give the model the golden's weights and statistics; it has as many parameters as the official one."""
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    model.load_state_dict(filter_fn(model)(official_weights(golden), model))


@torch.no_grad()
def check_case(model, case, levels=None):
    """Logits, and norms and shapes of the stages, whose maps are `levels` of the model; default: the last ones."""
    features, maps = model.forward_intermediates(fill.image(**case["input"]))
    logits = model.forward_head(features)
    head = torch.tensor(case["logits"])
    assert relative_error(logits[0, : len(head)], head) <= MODEL_GOLDEN
    assert logits.norm().item() == pytest.approx(case["logits_norm"], rel=MODEL_GOLDEN)
    stages = maps[-len(case["stage_norms"]) :] if levels is None else [maps[i] for i in levels]
    for stage, norm, shape in zip(stages, case["stage_norms"], case["stage_shapes"], strict=True):
        assert list(stage.shape) == shape
        assert stage.double().norm().item() == pytest.approx(norm, rel=MODEL_GOLDEN)


def check_native_keys_pass(name):
    """The family's filter leaves a state dict of our own alone, in any order, with and without the classifier."""
    model = timm.create_model(name, device="meta")
    state = dict(reversed(model.state_dict().items()))
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    for own in (state, headless):
        converted = filter_fn(model)(own, model)
        assert converted.keys() == own.keys()
        assert all(value is own[key] for key, value in converted.items())


@torch.inference_mode()
def check_levels(extractor, image):
    """Every level of the features has ceil(size / stride) tokens per axis, its channels, and finite values."""
    info, size = extractor.feature_info, image.shape[2:]
    for level, channels, stride in zip(extractor.eval()(image), info.channels(), info.reduction(), strict=True):
        assert level.shape == (len(image), channels, -(-size[0] // stride), -(-size[1] // stride))
        assert level.isfinite().all()
