"""torchao: int8 weights, and int8 activations with them, for the linear layers of every family."""

import copy

import pytest
import timm
import torch

import visattn
from tests.tolerances import SAME_MODEL, relative_error

pytest.importorskip("torchao")
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = visattn.list_models("test_*")


def size(model):
    """Bytes of the weights of linear layers, of which torchao quantises all."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    parts = [[getattr(w, name) for name in w.__tensor_flatten__()[0]] if hasattr(w, "qdata") else [w] for w in weights]
    return sum(part.nbytes for tensors in parts for part in tensors)


@torch.no_grad()
@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_int8(works, config):
    errors, shares = {}, []
    for name in SMALL:
        model, image = timm.create_model(name).eval(), torch.randn(2, 3, 96, 128)
        quantised = copy.deepcopy(model)
        quantize_(quantised, config())
        errors[name] = relative_error(quantised(image), model(image))
        shares.append(size(quantised) / size(model))
    assert max(errors.values()) <= 0.1, errors
    assert min(errors.values()) > 0
    assert max(shares) < 0.5
    worst = max(errors, key=errors.get)
    measured = f"logits within {errors[worst]:.1%} (`{worst}`), linear weights {min(shares):.0%} - {max(shares):.0%}"
    works("torchao", f"quantize_ with {config.__name__}", f"{len(SMALL)} models: {measured}")


@torch.no_grad()
def test_int8_compiles(works):
    """TransNeXt gives weights of linear layers to an op."""
    model, image = timm.create_model("test_transnext").eval(), torch.randn(2, 3, 64, 64)
    quantize_(model, Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    error = relative_error(compiled(image), model(image))
    assert error <= SAME_MODEL
    works("torchao", "Int8WeightOnlyConfig, then torch.compile", f"`test_transnext`: within {error:.0e}, one graph")
