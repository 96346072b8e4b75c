"""Tasks that a small model learns within some steps, and the loop that shows it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CLASSES = 4


def bars(number: int = 16, size: int = 64) -> tuple[Tensor, Tensor]:
    """Noise with a bright bar, whose height in the image is the class: [number, 3, size, size] and [number]."""
    labels = torch.arange(number) % CLASSES
    images = 0.5 * torch.randn(number, 3, size, size)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, label * size // CLASSES : (label + 1) * size // CLASSES] += 2
    return images, labels


def descend(
    parameters: Iterable[Tensor], compute_loss: Callable[[], Tensor], steps: int = 20, lr: float = 1e-3
) -> list[float]:
    """The losses of some steps of AdamW."""
    parameters = list(parameters)
    optimizer, losses = torch.optim.AdamW(parameters, lr), []
    for _ in range(steps):
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_fall(losses: list[float], share: float = 0.9) -> str:
    """Assert that the mean of the last three is below `share` of that of the first three; say both."""
    first, last = (sum(part) / 3 for part in (losses[:3], losses[-3:]))
    assert last < share * first, losses
    return f"loss {first:.3f} to {last:.3f} in {len(losses)} steps"
