"""transformers' DiNAT, NAT and OneFormer after `visattn.hf.repair()`: goldens, and the layout of transformers 4.53."""

import importlib
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch

from tests import tolerances
from tests.golden import fill
from tests.models.golden import cases, filter_fn, in_transformers, load, official_weights
from tests.tolerances import relative_error
from visattn import hf
from visattn.natten import natten2dav, natten2dqkrpb

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 3], [1, 2]]}
ROOT = Path(__file__).parents[2]
MAP = (48, 36)  # of an image: its maps have 12 x 9 and 6 x 5 tokens


@pytest.fixture(autouse=True)
def repaired():
    """transformers' modules with an attention that runs."""
    return [sys.modules[name] for name in hf.repair()]


def heads_first(self, hidden_states, output_attentions=False):
    """The attention of transformers up to 4.53: heads before the map, natten's functions of up to 0.17."""
    b, h, w, c = hidden_states.shape
    layers = (self.query, self.key, self.value)
    q, k, v = (f(hidden_states).view(b, h, w, self.num_attention_heads, -1).permute(0, 3, 1, 2, 4) for f in layers)
    dilation = getattr(self, "dilation", 1)
    scores = natten2dqkrpb(q / self.attention_head_size**0.5, k, self.rpb, self.kernel_size, dilation)
    weights = self.dropout(scores.softmax(-1))
    out = natten2dav(weights, v, self.kernel_size, dilation).permute(0, 2, 3, 1, 4).reshape(b, h, w, c)
    return (out, weights) if output_attentions else (out,)


def filled(model):
    """The model with all its parameters of a size that matters: tables are zeros at first."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def config(**kwargs):
    return transformers.DinatConfig(**{**TINY, **kwargs})


def official_classifier():
    golden = load("dinat_mini")
    dilations = [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]
    widths = {"embed_dim": 64, "depths": [3, 4, 6, 5], "num_heads": [2, 4, 8, 16], "mlp_ratio": 3.0}
    settings = config(**widths, kernel_size=7, dilations=dilations, num_labels=1000)
    model = transformers.DinatForImageClassification(settings).eval()
    model.load_state_dict(in_transformers(official_weights(golden)))
    return model, cases(golden)


@torch.no_grad()
def official_error():
    """How far the classifier's logits are from the official ones, at worst."""
    model, images = official_classifier()
    pairs = [(model(fill.image(**case["input"])).logits.flatten()[:32], case["logits"]) for case in images]
    return max(relative_error(logits, torch.tensor(expected)) for logits, expected in pairs)


def test_classifier_gives_the_official_logits_and_those_of_visattn(works):
    assert official_error() <= tolerances.MODEL_GOLDEN
    model, images = official_classifier()
    ours = timm.create_model("dinat_mini").eval()
    ours.load_state_dict(filter_fn(ours)(model.state_dict(), ours))
    with torch.no_grad():
        x = [fill.image(**case["input"]) for case in images]
        error = max(relative_error(model(image).logits, ours(image)) for image in x)
    assert error <= tolerances.SAME_MODEL
    works(
        "transformers",
        "DinatForImageClassification, repaired, with dinat_mini's weights",
        f"logits differ by {error:.1e}",
    )


# Nothing of transformers is touched but its own answer to whether natten is installed, which looks for a distribution.
UNTOUCHED = """
import visattn.natten; visattn.natten.install()
import transformers.utils.import_utils as utils; utils._natten_available = True
import tests.works_with.test_transformers_dinat as test
print(test.official_error())
"""


@pytest.mark.skipif(
    not version("transformers").startswith(("4.50", "4.51", "4.52", "4.53")),
    reason="later versions give natten wrong axes",
)
def test_transformers_untouched_on_the_natten_door(works):
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= tolerances.MODEL_GOLDEN
    works(
        "transformers", "DinatForImageClassification, untouched, on visattn.natten", f"within {float(done.stdout):.1e}"
    )


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_has_the_layout_of_453(repaired, works, output_attentions, training):
    """On a map that is not square, with gradients, and with dropout of the weights while training."""
    worst = 0.0
    for module in repaired:
        sizes = {"dim": 16, "num_heads": 2, "kernel_size": 3} | ({"dilation": 2} if "dinat" in module.__name__ else {})
        layer = module.NeighborhoodAttention(config(attention_probs_dropout_prob=0.3), **sizes).double()
        filled(layer).train(training)
        x = torch.randn(2, 12, 9, 16, dtype=torch.float64, requires_grad=True)
        results = []
        for attend in (layer, heads_first.__get__(layer)):
            torch.manual_seed(3)
            out = attend(x, output_attentions)
            assert len(out) == 1 + output_attentions
            grads = torch.autograd.grad(sum(t.square().sum() for t in out), [x, *layer.parameters()])
            results.append([*out, *grads])
        errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
        # Keys alike in all tokens change nothing: the gradient of their bias is rounding.
        key_bias = 2 + output_attentions + [n for n, _ in layer.named_parameters()].index("key.bias")
        worst = max([worst, *(e for i, e in enumerate(errors) if i != key_bias)])
    assert worst <= 1e-12
    if output_attentions and not training:
        works(
            "transformers", "DiNAT's attention, repaired, a 12 x 9 map, forward and backward", f"differs by {worst:.1e}"
        )


def test_backbone_inside_oneformer(repaired, works, monkeypatch):
    sizes = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "dilations": [[2], [2], [1], [1]]}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    oneformer = transformers.OneFormerConfig(
        backbone_config=config(**sizes, **stages), num_queries=5, hidden_dim=32, conv_dim=32, mask_dim=32,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, dim_feedforward=16, encoder_feedforward_dim=16,
        text_encoder_width=16, text_encoder_num_layers=1, text_encoder_proj_layers=1, text_encoder_n_ctx=2,
        text_encoder_vocab_size=50, text_encoder_context_length=7, task_seq_len=7,
    )  # fmt: skip
    model = transformers.OneFormerForUniversalSegmentation(oneformer).eval()
    for name, p in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(p)
    image, task = torch.randn(1, 3, 160, 96), torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        masks = model(image, task).masks_queries_logits
        monkeypatch.setattr(repaired[0].NeighborhoodAttention, "forward", heads_first)
        expected = model(image, task).masks_queries_logits
    error = relative_error(masks, expected)
    assert error <= 1e-5
    works("transformers", "OneFormer with a DiNAT backbone, repaired, 160 x 96", f"masks differ by {error:.1e}")


def test_training(works):
    model = transformers.DinatForImageClassification(config(num_labels=3, attention_probs_dropout_prob=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = torch.randn(6, 3, *MAP), torch.arange(6) % 3
    losses = []
    for _ in range(20):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    works(
        "transformers",
        "DinatForImageClassification, repaired, trained for 20 steps",
        f"{losses[0]:.2f} -> {losses[-1]:.2f}",
    )


def test_saved_and_loaded_backbones(repaired, tmp_path):
    kinds = [getattr(module, name) for module in repaired for name in dir(module) if name.endswith("atBackbone")]
    for kind in kinds:
        model = filled(kind(kind.config_class(**TINY, out_features=["stem", "stage2"]))).eval()
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            image = torch.randn(1, 3, *MAP)
            maps, expected = kind.from_pretrained(tmp_path).eval()(image).feature_maps, model(image).feature_maps
        assert [tuple(x.shape) for x in maps] == [(1, 16, 12, 9), (1, 32, 6, 5)]
        for got, want in zip(maps, expected, strict=True):
            assert torch.equal(got, want)
    assert len(kinds) == len(repaired)


def test_a_natten_without_the_old_functions_is_no_obstacle(monkeypatch):
    monkeypatch.delitem(sys.modules, hf.MODULES[0])
    monkeypatch.setattr(sys.modules["transformers.utils"], "is_natten_available", lambda: True)
    for name in ("natten", "natten.functional"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match="natten2d"):
        importlib.import_module(hf.MODULES[0])
    assert hf.MODULES[0] in hf.repair()
    model = sys.modules[hf.MODULES[0]].DinatModel(config()).eval()
    assert model(torch.randn(1, 3, *MAP)).last_hidden_state.shape == (1, 6, 5, 32)
    assert sys.modules["transformers.utils"].is_natten_available()


def test_missing_transformers_is_told(monkeypatch):
    monkeypatch.setattr(hf, "version", lambda package: version("a package that is not installed"))
    with pytest.raises(ImportError, match="expected transformers 4 or 5 installed, got none; try pip install"):
        hf.repair()


@pytest.mark.parametrize("version", ["4.49.0", "5.25.0.dev0", "6.0"])
def test_unknown_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(hf, "version", lambda package: version)
    with pytest.raises(
        hf.UnknownVersionError, match=f"expected transformers 4.50 to 5.24, got {version}; try pip install"
    ):
        hf.repair()
