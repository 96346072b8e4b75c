"""Split attention against its definition, one cardinal group and one split at a time."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden import fill
from tests.layers.checks import assert_same_with_gradients
from visattn.layers import SplAt


def by_definition(module, x, radix, cardinality, dilation):
    """Equations 1 to 3 of arXiv:2004.08955; group k of split r is block r * cardinality + k of the convolution."""

    def norm(bn, y, block, blocks):
        stats = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        mean, var, weight, bias = (s.chunk(blocks)[block].view(1, -1, 1, 1) for s in stats)
        return (y - mean) / (var + bn.eps).sqrt() * weight + bias

    out = []
    blocks = radix * cardinality
    for k in range(cardinality):
        splits = []
        for r in range(radix):
            block = r * cardinality + k
            part = x.chunk(blocks, 1)[block]
            y = F.conv2d(part, module.conv.weight.chunk(blocks)[block], padding=dilation, dilation=dilation)
            splits.append(norm(module.bn0, y, block, blocks).relu())
        pooled = sum(splits).mean((2, 3), keepdim=True)
        fc1, fc2 = module.fc1, module.fc2
        hidden = F.conv2d(pooled, fc1.weight.chunk(cardinality)[k], fc1.bias.chunk(cardinality)[k])
        hidden = norm(module.bn1, hidden, k, cardinality).relu()
        logits = F.conv2d(hidden, fc2.weight.chunk(cardinality)[k], fc2.bias.chunk(cardinality)[k]).chunk(radix, 1)
        exps = [logit.exp() for logit in logits]
        total = sum(exps) if radix > 1 else 1 + exps[0]
        out.append(sum(split * exp / total for split, exp in zip(splits, exps, strict=True)))
    return torch.cat(out, 1)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("cardinality", [1, 2, 4])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_values_and_gradients(radix, cardinality, dilation):
    module = SplAt(48, radix, cardinality, dilation, dtype=torch.float64).eval()
    shapes = {key: value.shape for key, value in module.state_dict().items() if "num_batches" not in key}
    module.load_state_dict(fill.fill(shapes))
    inputs = [torch.randn(2, 48, 7, 5, dtype=torch.float64, requires_grad=True), *module.parameters()]
    expected = by_definition(module, inputs[0], radix, cardinality, dilation)
    assert_same_with_gradients(module(inputs[0]), expected, inputs)
