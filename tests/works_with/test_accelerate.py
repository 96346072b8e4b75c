"""Accelerate: a fit of 20 steps, with gradients of two batches summed, and a state saved and loaded."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visattn  # noqa: F401
from tests.works_with.tasks import CLASSES, bars, check_fall

accelerate = pytest.importorskip("accelerate")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _forget_precision():
    """Its state is one for the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("name", "precision"), [("dinat_atto", "no"), ("dinat_atto", "bf16"), ("test_biformer", "no")])
def test_fit(works, name, precision, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = timm.create_model(name, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*bars(64)), 8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(5):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert len(losses) == 2 * 20
    accelerator.save_state(tmp_path)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    steps = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    works("accelerate", f"Accelerator({precision}), `{name}`, state read back", check_fall(steps))
