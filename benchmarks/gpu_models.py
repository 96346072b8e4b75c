"""Whole models on a GPU: visattn with Triton kernels, visattn's portable backend and timm's model, in one run.

Both models of a pair have the same random weights. Gate: logits and gradients of the images of four images in float32
without tf32, in evaluation mode. Timed at a batch of 128 images in channels_last: the forward pass with weights and
images in bfloat16, and a training step (forward in mixed precision, backward, AdamW) with weights in float32; each as
it is and under `torch.compile`. Times are wall time of calls that follow one another, launches by the host included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
import torch._functorch.config
import torch.nn.functional as F
from bench_device import Cpu, slug
from report import number
from torch import Tensor, nn

from visattn.ops.dispatch import explain, use_backend

TOLERANCE = 1e-3  # norm-wise, float32 in networks of tens of layers
GATE_IMAGES = 4
TRITON, EAGER, TIMM = "visattn triton", "visattn eager", "timm"
BACKENDS = {TRITON: "auto", EAGER: "eager", TIMM: "auto"}


@dataclass
class GpuModelResult:
    """One row; `times_ours` is its time over that of visattn with Triton kernels, compiled likewise."""

    model: str
    mode: str
    provider: str
    compiled: bool
    batch: int
    size: int
    error: float | None = None
    images_per_s: float | None = None
    median_ms: float | None = None
    times_ours: float | None = None
    peak_mb: float | None = None
    first_s: float | None = None
    calls: int = 0
    note: str = ""


COLUMNS = ("model", "mode", "provider", "compiled", "batch", "img/s", "ms", "x triton", "peak MB", "error", "note")


def row(r: GpuModelResult) -> list[str]:
    figures = [number(r.images_per_s, ".0f"), number(r.median_ms), number(r.times_ours), number(r.peak_mb, ".0f")]
    compiled = "yes" if r.compiled else "no"
    note = r.note.replace("|", "/")
    return [r.model, r.mode, r.provider, compiled, str(r.batch), *figures, number(r.error, ".0e"), note]


TEXT = """# Models on a GPU

`{command}` ({setting}).
Wall time, medians of interleaved calls; bfloat16, channels_last; a train step is forward in mixed precision, backward
and AdamW. `x triton` is how many times as long as visattn with Triton kernels, compiled likewise. `peak MB` is above
weights, optimizer and images. `error` is of logits and image gradients in float32.
"""


def isolated_compile(model: nn.Module) -> Callable:
    """`torch.compile`, sharing nothing with other compilations of the same code: they may trace another backend."""
    from torch._inductor.compile_fx import compile_fx

    return torch.compile(model, backend=lambda graph, inputs: compile_fx(graph, inputs), dynamic=False)


def logits_and_gradient(model: nn.Module, images: Tensor, backend: str) -> Tensor:
    """Of the images, in evaluation mode, as one vector."""
    leaf = images.clone().requires_grad_()
    with use_backend(backend):
        logits = model.eval()(leaf)
    (gradient,) = torch.autograd.grad(logits.square().mean(), leaf)
    logits = logits.detach()
    return torch.cat([logits.flatten() / logits.norm(), gradient.flatten() / gradient.norm()])


def gate(models: dict[str, nn.Module], size: int, device: Cpu) -> tuple[dict[str, float], str]:
    """Distance of every provider from visattn's portable backend; and which backends ran the first provider's ops."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    images = torch.randn(GATE_IMAGES, 3, size, size, generator=generator, device=device.torch_device)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with explain() as decisions:
            results = {TRITON: logits_and_gradient(models[TRITON], images, BACKENDS[TRITON])}
        results.update({n: logits_and_gradient(m, images, BACKENDS[n]) for n, m in models.items() if n != TRITON})
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    expected = results[EAGER].double()
    errors = {n: ((r.double() - expected).norm() / expected.norm()).item() for n, r in results.items()}
    ran = [d.backend for d in decisions]
    return errors, ", ".join(f"{ran.count(name)} calls {name}" for name in sorted(set(ran)))


def forward(model: Callable, images: Tensor, backend: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode(), use_backend(backend):
            return model(images)

    return run


def train_step(model: Callable, module: nn.Module, images: Tensor, backend: str) -> Callable[[], Tensor]:
    on_gpu = images.device.type == "cuda"
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=on_gpu)
    labels = torch.arange(len(images), device=images.device) % 1000

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16), use_backend(backend):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def prepared(models: dict[str, nn.Module], mode: str, device: Cpu) -> dict[str, nn.Module]:
    """The models for this mode; where two names are one model, they stay one."""
    changed: dict[nn.Module, nn.Module] = {}
    for model in models.values():
        if model not in changed:
            model.to(device.torch_device, torch.bfloat16 if mode == "forward" else torch.float32)
            model.train(mode != "forward").to(memory_format=torch.channels_last)
            changed[model] = model
    return {name: changed[model] for name, model in models.items()}


def measure(
    name: str,
    models: dict[str, nn.Module],
    mode: str,
    batch: int,
    size: int,
    device: Cpu,
    compiled: Sequence[bool] = (False, True),
    seconds: float = 1.0,
    gate_only: bool = False,
    providers: Sequence[str] = (TRITON, EAGER, TIMM),
) -> list[GpuModelResult]:
    """Gate the models (TRITON, EAGER and perhaps TIMM), then time those of `providers` that passed, in turns.

    The models are on the device in float32 and are changed.
    """
    errors, ran = gate(models, size, device)
    models = prepared({n: m for n, m in models.items() if n in providers}, mode, device)
    images = torch.randn(batch, 3, size, size, device=device.torch_device).contiguous(memory_format=torch.channels_last)
    images = images.bfloat16() if mode == "forward" else images
    results, runs = [], []
    for is_compiled in compiled:
        for provider, module in models.items():
            result = GpuModelResult(name, mode, provider, is_compiled, batch, size, errors[provider])
            results.append(result)
            if not result.error <= TOLERANCE:  # NaN fails too
                result.note = "wrong result: not timed"
                continue
            result.note = ran if provider == TRITON else ""
            try:
                model = isolated_compile(module) if is_compiled else module
                arguments = (images, BACKENDS[provider])
                run = forward(model, *arguments) if mode == "forward" else train_step(model, module, *arguments)
                start = time.perf_counter()
                finite = bool(run().isfinite().all())
                result.first_s = time.perf_counter() - start
                run()
                result.peak_mb = device.peak_bytes(run) / 1e6
            except Exception as error:
                result.note = report.failure(error)
                device.synchronize()
                continue
            if finite:
                runs.append((result, run))
            else:
                result.note = "wrong result: not finite"
    if not gate_only:
        time_in_turns(runs, seconds, device)
    times = {r.compiled: r.median_ms for r in results if r.provider == TRITON}
    for r in results:
        ours = times.get(r.compiled)
        r.times_ours = r.median_ms / ours if ours and r.median_ms else None
    return results


def time_in_turns(runs: list[tuple[GpuModelResult, Callable]], seconds: float, device: Cpu) -> None:
    """Medians of samples of two calls."""
    samples: list[list[float]] = [[] for _ in runs]
    deadline = time.monotonic() + seconds * len(runs)
    while runs and (time.monotonic() < deadline or len(samples[0]) < 3):
        for (_, run), times in zip(runs, samples, strict=True):
            device.synchronize()
            start = time.perf_counter()
            for _ in range(2):
                run()
            device.synchronize()
            times.append((time.perf_counter() - start) / 2)
    for (result, _), times in zip(runs, samples, strict=True):
        result.calls = 2 * len(times)
        result.median_ms = statistics.median(times) * 1e3
        result.images_per_s = result.batch / result.median_ms * 1e3


def main(
    args: argparse.Namespace,
    device: Any,
    build: Callable[[str], tuple[dict[str, nn.Module], int]],
    argv: Sequence[str] | None,
) -> int:
    """Every model in every mode; `build(name)` gives its providers on a CPU and the size of its images."""
    # Its key leaves out which backend is requested, so that one would get another's graph. The cache below it does not.
    torch._functorch.config.enable_autograd_cache = False
    out: Path = args.out or Path(__file__).parent / "results" / slug(device.name) / "bench_models"
    setting = {"GPU": device.name, "CUDA": str(torch.version.cuda), "triton": report.version("triton")}
    kept = report.earlier(out, setting) if args.update else []
    results = [GpuModelResult(**r) for r in kept]
    start = time.monotonic()
    new: list[GpuModelResult] = []
    compiled = {"no": (False,), "yes": (True,), "both": (False, True)}[args.compiled]
    for name in args.models:
        for mode in args.modes:
            print(f"[{time.monotonic() - start:.0f} s] {name}, {mode} ...", flush=True)
            try:
                models, size = build(name)
                models = {n: m.to(device.torch_device) for n, m in models.items()}
                options = (args.seconds, args.gate_only, args.providers)
                found = measure(name, models, mode, args.batch, size, device, compiled, *options)
            except Exception as error:
                found = [GpuModelResult(name, mode, "all", False, args.batch, 0, note=report.failure(error))]
            models = None
            device.forget()
            new += found
            replaced = {(r.model, r.mode, r.compiled) for r in found}
            results = [r for r in results if (r.model, r.mode, r.compiled) not in replaced] + found
            if not args.gate_only:
                report.write(results, COLUMNS, row, TEXT, "bench_models.py", argv, out, setting)
    report.show(new, COLUMNS, row, f"{device.name}, wall time")
    return int(any("wrong" in r.note or (r.provider in ("all", TRITON) and "failed" in r.note) for r in new))


# Those that say most first, since time on a GPU is short.
CUDA_MODELS = (
    "dinat_tiny",
    "maxvit_tiny_va",
    "halonet50ts_va",
    "biformer_tiny",
    "transnext_tiny",
    "agent_swin_tiny",
    "swin_tiny_va",
    "coatnet_0_va",
    "resnest50_va",
)
