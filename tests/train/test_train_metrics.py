"""What a run measures and shows: loss, speed, FLOPs, its lines, its bar, log.csv and curves.png."""

import contextlib
import copy
import csv
import errno
import io
import json
import os
import re

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import visattn  # noqa: F401
from visattn.layers.neighborhood import NeighborhoodAttention
from visattn.train import flops, metrics, pictures
from visattn.train.metrics import Meter, Speed
from visattn.train.progress import EpochBar, Status

ROW = dict.fromkeys(metrics.COLUMNS) | {
    "epoch": 2,
    "update": 40,
    "train_loss": 1 / 3,
    "eval_loss": 0.25,
    "top1": 97.5,
    "top5": 100.0,
    "lr": 1e-3,
    "grad_norm": 0.7,
    "images_per_s": 321.4,
    "skipped": 0,
    "bad_images": 0,
    "seconds": 4.56,
}
EMA = {"ema_loss": 0.2, "ema_top1": 97.8, "ema_top5": 100.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_meter_goes_on_from_json_as_if_never_stopped():
    losses = torch.rand(20, dtype=torch.float64).mul(7).tolist()
    whole, first, second = Meter(), Meter(), Meter()
    for index, loss in enumerate(losses):
        whole.add(loss, 1 + index % 3)
        (first if index < 9 else second).add(loss, 1 + index % 3)
        if index == 8:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert whole.loss == second.loss == pytest.approx(sum(losses) / 39)
    assert Meter().loss != Meter().loss  # NaN


def test_speed_stops_at_the_last_images(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    speed = Speed()
    assert speed.images_per_s == speed.data_wait == 0
    for _ in range(2):
        now[0] += 2
        speed.waited(0.5)
        speed.images(60)
    now[0] += 6  # evaluation
    assert (speed.images_per_s, speed.data_wait, speed.seconds) == (30, 0.25, 10)


def test_memory_of_this_process_counts_what_it_holds():
    held = torch.ones(50_000_000)
    peak = metrics.memory_gb(torch.device("cpu"))
    assert peak > held.nbytes / 1e9
    assert peak < 200
    assert metrics.memory_gb(torch.device("meta")) is None


def test_log_reads_back_exactly(tmp_path):
    history = [ROW, ROW | EMA | {"epoch": 3, "train_loss": 2 / 3, "mfu": 0.1}]
    metrics.write_log(tmp_path / "log.csv", history)
    with open(tmp_path / "log.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == metrics.COLUMNS
    for row, wrote in zip(rows, history, strict=True):
        assert {key: float(value) if value else None for key, value in row.items()} == wrote


def colors(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        counts = image.convert("RGB").getcolors(1 << 24)
    return {color: count for count, color in counts}


def test_curves_show_what_there_is(tmp_path):
    """Blue and grey curves, the best point in orange; green only with an average."""
    blue, grey, orange, green = (31, 119, 180), (127, 127, 127), (255, 127, 14), (44, 160, 44)
    history = [ROW | {"epoch": epoch, "train_loss": 2 / epoch, "top1": 90 + epoch} for epoch in range(1, 6)]
    pictures.draw_curves(tmp_path / "a.png", history, "run")
    without = colors(tmp_path / "a.png")
    assert min(without[blue], without[grey]) > 500
    assert without[orange] > 5
    assert green not in without
    pictures.draw_curves(tmp_path / "b.png", [row | EMA for row in history], "run")
    assert colors(tmp_path / "b.png")[green] > 500
    for name, loss in (("c.png", 0.22), ("d.png", 0.23)):  # one epoch is dots, not an empty picture
        pictures.draw_curves(tmp_path / name, [ROW | EMA | {"train_loss": loss}], "run")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "d.png").read_bytes()


def test_epoch_line():
    line = metrics.epoch_line(ROW, 150)
    assert line.startswith("epoch   2/150  train loss 0.333  test loss 0.250  top-1 97.50 %  top-5 100.00 %")
    assert line.endswith("lr 1.00e-03  321 img/s  4.6 s")
    line = metrics.epoch_line(ROW | EMA | {"mfu": 0.4321, "skipped": 2, "bad_images": 30}, 150)
    assert "top-1 97.50 % (EMA 97.80 %)" in line
    assert line.endswith("321 img/s  MFU 43.2%  4.6 s  2 updates skipped  30 unreadable images")


def show(stream, enabled=True):
    console = metrics.make_console(stream)
    with EpochBar(console, 12, 300, 1251, done=600, enabled=enabled) as bar:
        for _ in range(100):
            bar.step(Status(2.98765, 9.98e-4, 1.234, 12345.6, 0.031, 61.23))
    return bar


@pytest.mark.parametrize("columns", [80, 120])
def test_bar_fits_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    show(stream := Terminal())
    screens = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", stream.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", screens)]
    bar = re.sub(r"\s+", " ", screens[screens.rindex("epoch 12/300") :].replace("\n", ""))
    assert re.match(r"epoch 12/300 .*[━╸╺]+ *700/1251 ETA [\d:-]+", bar)
    status = "loss 2.988  lr 9.98e-04  grad norm 1.23  12346 img/s  data wait 3%  61.2 GB"
    assert status in lines
    assert len(status) < 80
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(("stream", "enabled"), [(Terminal(), False), (io.StringIO(), True)])
def test_bar_is_silent_elsewhere(monkeypatch, stream, enabled):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not show(stream, enabled).enabled
    assert stream.getvalue().strip() == ""


def test_lines_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "warning: [red]a long line[/] :smile: of output/run[1]"
    for stream in (Terminal(), io.StringIO()):
        metrics.say(metrics.make_console(stream), text)
        assert stream.getvalue() == f"{text}\n"


def test_output_that_nobody_can_take_is_no_error():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    metrics.say(metrics.make_console(Full()), "text")
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")  # noqa: SIM115
    metrics.say(metrics.make_console(stream), "text")
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def counted_by_hand(name, size):
    """FLOPs of a model of convolutions, linear layers and neighbourhood attention, from the shapes in a real run."""
    model, total = timm.create_model(name).eval(), []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            total.append(2 * output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            total.append(2 * output.numel() * module.in_features)
        elif isinstance(module, NeighborhoodAttention):  # queries by keys, and weights by values
            total.append(2 * 2 * output.numel() * module.kernel_size[0] * module.kernel_size[1])

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    return sum(total)


@pytest.mark.parametrize("name", ["test_convnext", "test_dinat"])
def test_flops_are_those_of_the_layers(name):
    counted = flops.forward_flops(timm.create_model(name), 3, 160)
    assert counted == counted_by_hand(name, 160)


def test_flops_of_well_known_models():
    """ResNet-50: 4.09 GMACs in torchvision's table. ViT-Tiny: 197 tokens of 192 in 12 blocks."""
    resnet, vit = (timm.create_model(name, device="meta") for name in ("resnet50", "vit_tiny_patch16_224"))
    assert flops.forward_flops(resnet, 3, 224) == pytest.approx(2 * 4.089e9, rel=2e-4)
    blocks = 12 * (12 * 197 * 192**2 + 2 * 197**2 * 192)
    assert flops.forward_flops(vit, 3, 224) == 2 * (blocks + 196 * 768 * 192 + 192 * 1000)


def test_counting_flops_leaves_the_model_alone():
    # The second norm cannot train on one image.
    norms = nn.BatchNorm2d(4), nn.BatchNorm1d(144)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norms[0], nn.Dropout(), nn.Flatten(), norms[1], nn.Linear(144, 2))
    norms[0].eval()  # a frozen norm in a model that trains

    def everything():
        tensors = model.state_dict()
        places = [tensor.data_ptr() for tensor in tensors.values()]
        modes = [module.training for module in model.modules()]
        return places, modes, [*copy.deepcopy(list(tensors.values())), torch.get_rng_state()]

    places, modes, values = everything()
    assert flops.forward_flops(model, 1, 8) == 2 * (9 * 4 * 36 + 144 * 2)
    assert everything()[:2] == (places, modes)
    assert all(map(torch.equal, everything()[2], values))


def test_flops_of_a_model_that_needs_values_are_unknown():
    class Dynamic(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    assert flops.forward_flops(Dynamic(8, 2), 3, 8) is None


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 495),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA GB200", 2500, 1250),
        ("NVIDIA B200", 2250, 1100),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ],
)
def test_peak_of_a_gpu(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert flops.peak_flops(device, "bfloat16") == (half and half * 1e12)
    assert flops.peak_flops(device, "none") == (single and single * 1e12)
    assert flops.peak_flops(device, "none", 7.5) == 7.5e12


def test_utilization():
    assert flops.peak_flops(torch.device("cpu"), "none") is None
    assert flops.utilization(4e9, 1000, 8, 12e12) == pytest.approx(0.125)  # 3 × 4 GFLOP × 1000 of 8 × 12 TFLOP
    assert flops.utilization(None, 1000, 8, 12e12) is None
    assert flops.utilization(4e9, 1000, 8, None) is None
