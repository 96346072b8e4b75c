"""What a provider computes, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_cases import Attend, Case
from torch import Tensor

# Norm-wise, against float64.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# The reference holds tensors as large as all pairs of tokens; on larger maps eager in float64 stands for it.
REFERENCE_TOKENS = 4096


def runner(
    attend: Attend, inputs: dict[str, Tensor], mode: str, cotangent: Tensor | None = None
) -> Callable[[], list[Tensor]]:
    """A call that returns the output and, with the backward, the gradient of every input.

    Inputs are as the case has them; the cotangent is laid out as `attend` returns its output (default: ones).
    """
    inputs = attend.into(**inputs) if hasattr(attend, "into") else inputs
    if mode == "forward":

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [attend(**inputs)]

        return run
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    if cotangent is None:
        shape = attend(**inputs).shape
        cotangent = torch.ones((), dtype=next(iter(inputs.values())).dtype).expand(shape)

    def run_both() -> list[Tensor]:
        out = attend(**leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))]

    return run_both


class Given:
    """A case's inputs and the gradient of its output, and what the reference makes of them in float64.

    A fused case is checked on its first and last image, which takes both passes over the whole batch: the gradient
    of the output is zero for the other images, so that gradients of parameters come from these two alone.
    """

    def __init__(self, case: Case, mode: str, device: torch.device) -> None:
        inputs = case.inputs(device)
        self.batch = case.batch
        self.parameters = inputs.keys() - set(case.maps)
        self.tolerance = TOLERANCES[case.dtype]
        self.images = [0, case.batch - 1] if case.fused and case.batch > 2 else list(range(case.batch))
        self.inputs = case.fuse(inputs) if case.fused else inputs
        self.dense: Tensor | None = None
        self.checked: Tensor | None = None
        cotangent = None
        if case.fused and mode != "forward":
            generator = torch.Generator(device).manual_seed(1)
            shape = (case.batch, *case.size, case.heads, case.dim)
            self.dense = torch.randn(shape, generator=generator, device=device).to(case.dtype)
            self.checked = torch.zeros_like(self.dense)
            self.checked[self.images] = self.dense[self.images]
            cotangent = self.dense[self.images].double()
        few = {n: (t[self.images] if n in case.maps else t).double() for n, t in inputs.items()}
        truth = case.visattn("reference" if case.tokens() <= REFERENCE_TOKENS else "eager")
        out, *grads = runner(truth, few, mode, cotangent)()
        self.expected = {"out": out, **dict(zip(inputs, grads, strict=False))}

    def cotangents(self, attend: Attend) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the output as `attend` lays it out: for the gate, and to be timed with."""
        if self.checked is None or self.dense is None:
            return None, None
        place = getattr(attend, "out", lambda t: t)
        return place(self.checked).clone(), place(self.dense)

    def in_layout(self, attend: Attend) -> dict[str, Tensor]:
        """The expected results as `attend` lays them out: gradients lie as the inputs do."""
        out, grads = self.expected["out"], {n: t for n, t in self.expected.items() if n != "out"}
        out = attend.out(out) if hasattr(attend, "out") else out
        grads = attend.into(**grads) if grads and hasattr(attend, "into") else grads
        return {"out": out, **grads}

    def of_images(self, got: Tensor, expected: Tensor) -> Tensor:
        """What was computed for the images that are checked; windows of an image follow one another."""
        if got.shape == expected.shape:
            return got
        return got.unflatten(0, (self.batch, -1))[self.images].flatten(0, 1)

    def check(self, attend: Attend, got: list[Tensor]) -> tuple[float, bool]:
        """The largest norm-wise relative error, and whether all are within the tolerance.

        NaN, which is not, if anything, of any image, is not finite.
        """
        if not all(bool(g.isfinite().all()) for g in got):
            return float("nan"), False
        errors, within = [], True
        for (name, e), g in zip(self.in_layout(attend).items(), got, strict=True):
            errors.append(((self.of_images(g, e).double() - e).norm() / e.norm()).item())
            limit = getattr(attend, "parameter_tolerance", 0.0) if name in self.parameters else 0.0
            within = within and errors[-1] <= max(limit, self.tolerance)
        return max(errors), within
