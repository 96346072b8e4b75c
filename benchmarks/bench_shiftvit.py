"""Time ShiftViT against its official form with the same weights: a correctness gate first, then interleaved medians.

    python benchmarks/bench_shiftvit.py                                              # light and r2, eager and compiled
    python benchmarks/bench_shiftvit.py --models shiftvit_r2_tiny --forms eager      # one model, not compiled
    python benchmarks/bench_shiftvit.py --out benchmarks/results/bench_shiftvit_cpu  # also write .json and .md

The official form, written here from the paper, has maps [B, C, H, W], 1x1 convolutions, and writes the shifted slices
into a map of zeros. A train step is the forward and the backward pass in training mode, without an optimizer. Times are
CPU seconds of this process on one thread; only ratios are meant to be compared.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import report
import timm
import torch
import torch.nn.functional as F
from bench_models import MODES, runner
from torch import Tensor, nn

import visattn  # noqa: F401  registers the models

TOLERANCE = 1e-10  # norm-wise, of both models in float64
FORMS = ("eager", "compiled")


class OfficialBlock(nn.Module):
    """Shift by slice assignment, then the MLP."""

    def __init__(self, dim: int, hidden: int, shifted: int) -> None:
        super().__init__()
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Conv2d(dim, hidden, 1), "fc2": nn.Conv2d(hidden, dim, 1)})
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        g, out = self.shifted, torch.zeros_like(x)  # [B, C, H, W]
        out[:, :g, :, :-1] = x[:, :g, :, 1:]
        out[:, g : 2 * g, :, 1:] = x[:, g : 2 * g, :, :-1]
        out[:, 2 * g : 3 * g, :-1] = x[:, 2 * g : 3 * g, 1:]
        out[:, 3 * g : 4 * g, 1:] = x[:, 3 * g : 4 * g, :-1]
        out[:, 4 * g :] = x[:, 4 * g :]
        return out + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(out))))


class OfficialShiftViT(nn.Module):
    """The network under the official names."""

    def __init__(self, embed_dim: int, depths: Sequence[int], mlp_ratio: float, n_div: int) -> None:
        super().__init__()
        stem = {"proj": nn.Conv2d(3, embed_dim, 4, 4), "norm": nn.GroupNorm(1, embed_dim)}
        self.patch_embed = nn.ModuleDict(stem)
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = (OfficialBlock(dim, int(dim * mlp_ratio), dim // n_div) for _ in range(depth))
            parts: dict[str, nn.Module] = {"blocks": nn.Sequential(*blocks)}
            if i < len(depths) - 1:
                reduction = nn.Conv2d(dim, 2 * dim, 2, 2, bias=False)
                parts["downsample"] = nn.ModuleDict({"norm": nn.GroupNorm(1, dim), "reduction": reduction})
            self.layers.append(nn.ModuleDict(parts))
        self.norm = nn.GroupNorm(1, dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["norm"](self.patch_embed["proj"](x))
        for layer in self.layers:
            x = layer["blocks"](x)
            if "downsample" in layer:
                x = layer["downsample"]["reduction"](layer["downsample"]["norm"](x))
        return self.head(self.norm(x).mean((2, 3)))


@dataclass
class Result:
    """One row of the table: CPU milliseconds per image of both forms and their ratio."""

    model: str
    mode: str
    form: str
    batch: int
    size: int
    error: float
    ms: float | None = None
    official_ms: float | None = None
    times_faster: float | None = None
    note: str = ""


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and the official form, with the same random weights."""
    torch.manual_seed(0)
    family = importlib.import_module("visattn.models.shiftvit")
    args = {"embed_dim": 96, "mlp_ratio": 2.0, "n_div": 12, **family.VARIANTS[name].args}
    official = OfficialShiftViT(*(args[key] for key in ("embed_dim", "depths", "mlp_ratio", "n_div")))
    ours = timm.create_model(name, drop_path_rate=0.0)
    ours.load_state_dict(family.checkpoint_filter_fn(official.state_dict(), ours))
    return ours, official


def measure(name: str, mode: str, form: str, batch: int, size: int, repeats: int) -> Result:
    """Gate both, then time them, one call each in turn."""
    models = build(name)
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    got, expected = (runner(model.double(), image.double(), mode)().clone() for model in models)
    error = ((got - expected).norm() / expected.norm()).item()
    result = Result(name, mode, form, batch, size, error)
    if not error <= TOLERANCE:  # NaN fails too
        result.note = "wrong result: not timed"
        return result
    torch._dynamo.reset()
    runs = []
    for model in models:
        model.float()
        runs.append(runner(torch.compile(model) if form == "compiled" else model, image, mode))
        runs[-1]()
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for run, samples in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            samples.append(time.process_time() - start)
    result.ms, result.official_ms = (1e3 * statistics.median(samples) / batch for samples in times)
    result.times_faster = result.official_ms / result.ms
    return result


COLUMNS = ("model", "mode", "form", "batch", "size", "ms", "official ms", "x official", "error", "note")


def row(r: Result) -> list[str]:
    figures = [report.number(x) for x in (r.ms, r.official_ms, r.times_faster)]
    return [r.model, r.mode, r.form, str(r.batch), str(r.size), *figures, f"{r.error:.0e}", r.note]


TEXT = """# ShiftViT on a CPU

`{{command}}` ({{setting}}, {cpu}).
CPU milliseconds per image on one thread, medians of interleaved calls; both have the same weights. The official form
has maps [B, C, H, W], 1x1 convolutions, and writes the shifted slices into a map of zeros.
Not measured on a GPU.
"""


def cpu_name() -> str:
    """Of this machine, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown CPU"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shiftvit_light_tiny", "shiftvit_r2_tiny"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for name in args.models:
        for mode in args.modes:
            for form in args.forms:
                print(f"{name}, {mode}, {form} ...", flush=True)
                results.append(measure(name, mode, form, args.batch, args.size, args.repeats))
    report.publish(results, COLUMNS, row, TEXT.format(cpu=cpu_name()), "bench_shiftvit.py", argv, args.out)
    return int(any(r.note for r in results))


if __name__ == "__main__":
    sys.exit(main())
