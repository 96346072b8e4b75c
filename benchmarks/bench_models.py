"""Time models against timm's with the same weights, in one run: a correctness gate first, then interleaved medians.

    python benchmarks/bench_models.py                                       # every pair
    python benchmarks/bench_models.py --models halonet50ts_va --batch 8     # one pair, another batch size
    python benchmarks/bench_models.py --out benchmarks/results/bench_models_cpu  # also write .json and .md

Both models get timm's random weights (ours through its checkpoint filter) and the same images. A pair whose logits or
image gradients differ in float64 is not timed, and the exit status is 1. Timed in float32. A train step is the forward
and the backward pass in training mode, without an optimizer. Times are CPU seconds of this process on one thread; only
ratios are meant to be compared.

    python benchmarks/bench_models.py --device cuda   # gpu_models.py: other models, other rules

Without a GPU that ends with status 2.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_models
import timm
import torch
from bench_device import open_device
from report import number, publish
from torch import Tensor, nn

import visattn  # noqa: F401  registers the models
from visattn.models.coatnet import TIMM_OPTIONS

TOLERANCE = 1e-7  # norm-wise, of both models in float64: rounding grows in a random network with batch statistics
MODES = ("forward", "train step")


@dataclass(frozen=True)
class Pair:
    """One of our models and timm's model of the same network."""

    model: str
    timm_model: str
    size: int = 224
    options: dict[str, Any] = field(default_factory=dict)
    timm_options: dict[str, Any] = field(default_factory=dict)


PAIRS = [
    Pair("maxvit_tiny_va", "maxvit_tiny_tf_224"),
    Pair("coatnet_0_va", "coatnet_0_224", options={"head_hidden_size": 768, **TIMM_OPTIONS}),
    Pair("coatnet_0_rw_va", "coatnet_0_rw_224"),
    Pair("convit_tiny_va", "convit_tiny"),
    Pair("convit_tiny_va", "convit_tiny", 512, {"img_size": 512}, {"img_size": 512}),
    Pair("halonet26t_va", "halonet26t", 256),
    Pair("halonet50ts_va", "halonet50ts", 256),
    Pair("resnest50_va", "resnest50d"),
]
GPU_PAIRS = [*PAIRS, Pair("swin_tiny_va", "swin_tiny_patch4_window7_224")]


@dataclass
class Result:
    """One row of the table: images per CPU second of both models and their ratio."""

    model: str
    timm_model: str
    mode: str
    batch: int
    size: int
    error: float
    images_per_s: float | None = None
    timm_images_per_s: float | None = None
    times_faster: float | None = None
    note: str = ""


def build(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same random weights, scales (some are zero at first) and statistics."""
    torch.manual_seed(0)
    theirs = timm.create_model(pair.timm_model, drop_path_rate=0.0, **pair.timm_options)
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    ours = timm.create_model(pair.model, drop_path_rate=0.0, **pair.options)
    convert = importlib.import_module(type(ours).__module__).checkpoint_filter_fn
    ours.load_state_dict(convert(theirs.state_dict(), ours))
    return ours, theirs


def build_providers(name: str) -> tuple[dict[str, nn.Module], int]:
    """The models to compare on a GPU, and the size of their images."""
    pair = next((pair for pair in GPU_PAIRS if pair.model == name), None)
    if pair is None:
        torch.manual_seed(0)
        ours = timm.create_model(name, drop_path_rate=0.0)
        return {gpu_models.TRITON: ours, gpu_models.EAGER: ours}, 224
    ours, theirs = build(pair)
    return {gpu_models.TRITON: ours, gpu_models.EAGER: ours, gpu_models.TIMM: theirs}, pair.size


def runner(model: nn.Module, image: Tensor, mode: str) -> Callable[[], Tensor]:
    """A call of the model; returns the logits or the gradient of the images."""
    if mode == "forward":
        model.eval()

        def forward() -> Tensor:
            with torch.inference_mode():
                return model(image)

        return forward
    model.train()
    leaf = image.clone().requires_grad_()

    def train_step() -> Tensor:
        model.zero_grad()
        leaf.grad = None
        model(leaf).square().mean().backward()
        return leaf.grad

    return train_step


def measure(pair: Pair, mode: str, batch: int, repeats: int) -> Result:
    """Gate the pair, then time it, one call each in turn."""
    models = build(pair)
    image = torch.randn(batch, 3, pair.size, pair.size, generator=torch.Generator().manual_seed(0))
    got, expected = (runner(model.double(), image.double(), mode)().clone() for model in models)
    error = ((got - expected).norm() / expected.norm()).item()
    result = Result(pair.model, pair.timm_model, mode, batch, pair.size, error)
    if not error <= TOLERANCE:  # NaN fails too
        result.note = "wrong result: not timed"
        return result
    runs = [runner(model.float(), image, mode) for model in models]
    for run in runs:
        run()
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for run, samples in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            samples.append(time.process_time() - start)
    ours, theirs = (statistics.median(samples) for samples in times)
    result.images_per_s, result.timm_images_per_s = batch / ours, batch / theirs
    result.times_faster = theirs / ours
    return result


COLUMNS = ("model", "timm", "mode", "batch", "size", "img/s", "timm img/s", "x timm", "error", "note")


def row(r: Result) -> list[str]:
    figures = [number(x) for x in (r.images_per_s, r.timm_images_per_s, r.times_faster)]
    return [r.model, r.timm_model, r.mode, str(r.batch), str(r.size), *figures, f"{r.error:.0e}", r.note]


TEXT = """# Models on a CPU

`{command}` ({setting}).
Images per CPU second of one thread, medians of interleaved calls; both models have the same weights.
Not measured on a GPU.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(pair.model for pair in PAIRS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(dict.fromkeys((*names, *gpu_models.CUDA_MODELS))))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, help="default: 2, and 128 on a GPU")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each model")
    parser.add_argument("--out", type=Path, help="path without suffix for the .json and .md results")
    gpu = parser.add_argument_group("only with --device cuda")
    gpu.add_argument("--compiled", choices=("no", "yes", "both"), default="both", help="under torch.compile")
    gpu.add_argument("--providers", nargs="+", choices=list(gpu_models.BACKENDS), default=list(gpu_models.BACKENDS))
    gpu.add_argument("--seconds", type=float, default=1.0, help="wall time per provider and mode (>= 6 calls)")
    gpu.add_argument("--update", action="store_true", help="keep the results in --out of what is not measured now")
    gpu.add_argument("--gate-only", action="store_true", help="time nothing; fills the caches of all compilers")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        args.models, args.batch = args.models or gpu_models.CUDA_MODELS, args.batch or 128
        return gpu_models.main(args, open_device("cuda"), build_providers, argv)
    args.models, args.batch = args.models or names, args.batch or 2
    if missing := set(args.models) - set(names):
        parser.error(f"no models of --device cpu: {', '.join(sorted(missing))}")

    torch.set_num_threads(1)
    results = []
    for pair in (p for p in PAIRS if p.model in args.models):
        for mode in args.modes:
            print(f"{pair.model}, {mode} ...", flush=True)
            results.append(measure(pair, mode, args.batch, args.repeats))
    publish(results, COLUMNS, row, TEXT, "bench_models.py", argv, args.out)
    return int(any(r.note for r in results))


if __name__ == "__main__":
    sys.exit(main())
