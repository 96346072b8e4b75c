"""Stand-ins for kernels with launch configs, for the tests of tuning."""

import json

import torch

from visattn.ops.fused.tuning import Config, run_tuned

CPU = torch.device("cpu")
SHAPE = (56, 7, "float32")
DEFAULT, FAST, FASTEST = CONFIGS = [Config(64, 32, 4, 2), Config(64, 64, 4, 2), Config(128, 32, 8, 3)]


class Kernel:
    """Counts its launches and takes the milliseconds it is told to, on a clock that nothing else moves."""

    now = 0.0

    def __init__(self, costs=(3.0, 2.0, 1.0), results=None):
        self.costs = dict(zip(CONFIGS, costs, strict=True))
        self.results = results or {}
        self.launched = []

    def __call__(self, config):
        self.launched.append(config)
        Kernel.now += self.costs[config] / 1e3
        result = self.results.get(config, lambda out: out)
        return (result(torch.linspace(-1, 1, 1000)), torch.arange(3))


def chosen(kernel, name="kernel", candidates=CONFIGS):
    """The config of the launch whose results are returned."""
    run_tuned(name, SHAPE, CPU, candidates, kernel)
    return kernel.launched[-1]


def write(path, config, kernel="kernel", gpu="cpu"):
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"kernel": kernel, "shape_class": list(SHAPE), "config": vars(config), "median_ms": 1.0, "default_ms": 4.0}
    path.write_text(json.dumps({"format": 1, "gpu": gpu, "entries": [entry]}))


def entries(path):
    return {e["kernel"]: e for e in json.loads(path.read_text())["entries"]}
