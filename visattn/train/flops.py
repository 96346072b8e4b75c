"""How much a model computes, and the share of what the device could (MFU)."""

import re

import torch
from torch import nn

import visattn.flops

# Dense matrix products of one device in TFLOP/s: in half precision with sums in float32, and in float32 as cuDNN does
# them by default (TF32; plain float32 before Ampere). From NVIDIA's data sheets, RTX cards from the white papers of
# their architecture; half of the sparse rate where only that is printed. The first name found counts.
PEAKS = {
    "GB200": (2500, 1250),
    "B200": (2250, 1100),
    "GH200": (989, 495),
    "H200 NVL": (835, 418),
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 418),
    "H100": (989, 495),
    "A100": (312, 156),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60),
    "V100-PCIE": (112, 14),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
# Parts and relatives of these devices, with rates of their own.
OTHERS = ("MIG", "Laptop", "Max-Q", "4090 D", "3090 Ti")


def forward_flops(model: nn.Module, in_chans: int, img_size: int) -> int | None:
    """`visattn.flops.forward_flops` of a square image; None if the model cannot run without data.

    Call it before the model is wrapped or sharded.
    """
    try:
        return visattn.flops.forward_flops(model, in_chans, img_size, img_size)
    except Exception:  # whatever a model does that needs real values; the count is only information
        return None


def peak_flops(device: torch.device, amp: str, override_tflops: float | None = None) -> float | None:
    """FLOP/s that `device` could do in matrix products; None if unknown."""
    if override_tflops is not None:
        return override_tflops * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if any(other in name for other in OTHERS):
        return None
    rates = (rates for part, rates in PEAKS.items() if re.search(rf"\b{part}\b", name))
    half, single = next(rates, (None, None))
    peak = single if amp == "none" else half
    return peak and peak * 1e12


def utilization(flops_per_image: int | None, images_per_s: float, world_size: int, peak: float | None) -> float | None:
    """Share of `peak` that training used. A step counts as three forward passes, recomputed activations as nothing."""
    if flops_per_image is None or peak is None:
        return None
    return 3 * flops_per_image * images_per_s / (world_size * peak)
