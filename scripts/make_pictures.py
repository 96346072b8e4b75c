"""Draw the pictures of README.md and docs/ into docs/assets/, from runs of what they show.

    python scripts/make_pictures.py                            # all, in some minutes on a CPU
    python scripts/make_pictures.py --only attention training  # what needs no tools/install_mm.sh

`speed.png` is drawn by benchmarks/plot_peers.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from visattn.ops import (
    aggregated_attention,
    bilevel_routing_attention,
    halo_attention,
    neighborhood_attention,
    window_attention,
)

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
TOKENS, PIXELS, REGIONS = 42, 10, 7  # per axis: tokens of the map, pixels of a token, regions of the map
QUERY = 24, 16


def training(folder: Path) -> Image.Image:
    """The curves of `python -m train`."""
    run("-m", "train", "--output", str(folder), "--name", "digits")
    return Image.open(folder / "digits" / "curves.png")


def detection(folder: Path) -> Image.Image:
    """Test images of tools/demo_det.py, with the truth above and what was found below."""
    run("tools/demo_det.py", "--out", str(folder))
    picture = Image.open(folder / "nuclei.png")
    picture.thumbnail((1120, 1120))
    return picture


def attention(folder: Path) -> Image.Image:
    """A photo as one query sees it with each attention: in colour, the rest dark. Pooled keys are drawn as averages."""
    from sklearn.datasets import load_sample_images

    side = TOKENS * PIXELS
    photo = load_sample_images().images[0][:side, 20 : 20 + side] / 255
    x = torch.from_numpy(photo).unflatten(1, (TOKENS, PIXELS)).unflatten(0, (TOKENS, PIXELS))  # [H, p, W, p, 3]
    x = x.mean((1, 3))  # [H, W, 3]
    q = (x - x.mean((0, 1)))[None, :, :, None]  # [1, H, W, 1, 3]; queries and keys are colours
    stripe = 3
    attentions: dict[str, Callable[[Tensor], Tensor]] = {
        "window (Swin)": lambda v: window_attention(q, q, v, 7),
        "grid (MaxViT)": lambda v: window_attention(q, q, v, 7, grid=True),
        "cross-shaped (CSWin)": lambda v: (
            window_attention(q, q, v, (TOKENS, stripe)) + window_attention(q, q, v, (stripe, TOKENS))
        ),
        "halo (HaloNet)": lambda v: halo_attention(q, q, v, block_size=6, halo_size=3),
        "neighborhood (NAT)": lambda v: neighborhood_attention(q, q, v, 7),
        "dilated neighborhood (DiNAT)": lambda v: neighborhood_attention(q, q, v, 7, dilation=5),
        "bi-level routing (BiFormer)": lambda v: bilevel_routing_attention(q, q, v, REGIONS, topk=4),
    }
    figure, axes = plt.subplots(2, 4, figsize=(16, 8.8))
    for axis, (title, attend) in zip(axes.flat, attentions.items(), strict=False):
        draw(axis, title, photo, seen(attend))
    pooled = photo.reshape(REGIONS, side // REGIONS, REGIONS, side // REGIONS, 3).mean((1, 3))
    pooled = pooled.repeat(side // REGIONS, 0).repeat(side // REGIONS, 1)
    draw(axes[1, 3], "aggregated (TransNeXt)", photo, seen(lambda v: aggregated(q, v)), pooled)
    figure.tight_layout()
    figure.savefig(folder / "attention.png", dpi=80)
    plt.close(figure)
    return Image.open(folder / "attention.png")


def aggregated(q: Tensor, v: Tensor) -> Tensor:
    """Aggregated attention with neighbours of 3 x 3, one pooled key per region, and no position bias."""
    keys = avg_pool2d(q[..., 0, :].permute(0, 3, 1, 2), TOKENS // REGIONS).permute(0, 2, 3, 1)[..., None, :]
    zeros = q.new_zeros
    mlp = zeros(4, 2), zeros(4), zeros(1, 4), zeros(1)
    window = {"k": q, "v": v, "kernel_size": 3, "local_bias": zeros(1, 9)}
    return aggregated_attention(
        q, keys, torch.zeros_like(keys[..., :1]), zeros(1), zeros(1, 3), *mlp, pretrain_size=TOKENS, **window
    )


def seen(attend: Callable[[Tensor], Tensor]) -> np.ndarray:
    """[H, W]: whether the query's output depends on the value there."""
    v = torch.zeros(1, TOKENS, TOKENS, 1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(attend(v)[0, QUERY[0], QUERY[1]].sum(), v)
    return (gradient[0, :, :, 0, 0] > 0).numpy()


def draw(axis: plt.Axes, title: str, photo: np.ndarray, visible: np.ndarray, rest: np.ndarray | None = None) -> None:
    """The photo [side, side, 3] where the map of tokens is visible; elsewhere `rest`, by default dark and grey."""
    if rest is None:
        rest = (0.1 + 0.35 * photo.mean(-1, keepdims=True)).repeat(3, -1)
    mask = visible.repeat(PIXELS, 0).repeat(PIXELS, 1)[..., None]
    axis.imshow(np.where(mask, photo, rest))
    axis.contour(mask[..., 0], [0.5], colors="gold", linewidths=1)
    place = QUERY[1] * PIXELS - 0.5, QUERY[0] * PIXELS - 0.5
    for colour, width in (("black", 4), ("white", 2)):
        axis.add_patch(plt.Rectangle(place, PIXELS, PIXELS, fill=False, edgecolor=colour, linewidth=width))
    axis.set_title(title, fontsize=15)
    axis.axis("off")


def run(*command: str) -> None:
    """Run one of the repository's programs."""
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


PICTURES = {"attention": attention, "training": training, "detection": detection}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES, help="which to draw (default: all)")
    for name in parser.parse_args(argv).only:
        with tempfile.TemporaryDirectory() as folder:
            picture = PICTURES[name](Path(folder)).convert("RGB")
            file = ASSETS / f"{name}.png"
            picture.save(file, optimize=True)
        print(f"wrote {file}: {picture.width} x {picture.height}, {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
