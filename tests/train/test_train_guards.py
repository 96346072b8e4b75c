"""Values that are not finite, images that are not readable: noticed by all processes at once, and nothing is lost."""

import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from runs import build, rows, slow

from tests.train.test_train_sources import BAD
from visattn.train import engine
from visattn.train import run as trainer
from visattn.train.loader import Batches
from visattn.train.metrics import Speed

SHORT = ("--img-size", 32, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0, "--ema-decay", 0.9)
BAD_UPDATE = 6  # counted from 1: epoch 2, update 2 of 4
PLACES = ("input", "logits", "loss", "gradient", "weight")


def poison(place, rank=0, value=float("nan")):
    """In update 6, on one rank, something becomes NaN; and what an update must not touch is compared."""
    take = engine.Engine.update

    def snapshot(self):
        tensors = [
            *self.model.state_dict().values(),
            *self.state.task.trainable_module_ema.module.state_dict().values(),
        ]
        tensors += [v for state in self.state.optimizer.state.values() for v in state.values()]
        return [getattr(tensor, "to_local", lambda t=tensor: t)().clone() for tensor in tensors]

    def update(self, batches, speed):
        if self.state.update + 1 != BAD_UPDATE:
            return take(self, batches, speed)
        handles = []
        if self.world.rank == rank:
            largest = max(self.trained, key=torch.Tensor.numel)
            sharded = hasattr(largest, "to_local")
            if place == "input":
                batches = ((images * value, target) for images, target in batches)
            elif place == "logits":
                handles.append(self.model.register_forward_hook(lambda module, args, output: output * value))
            elif place == "loss":
                handles.append(
                    self.state.task.register_forward_hook(lambda m, a, out: {**out, "loss": out["loss"] * value})
                )
            elif place == "gradient" and not sharded:
                handles.append(largest.register_hook(lambda gradient: gradient * value))
            elif place == "gradient":  # autograd never sees a shard's gradient
                backward = self._backward
                self._backward = lambda *args: (backward(*args), largest.grad.to_local().mul_(value))[0]
            elif place == "weight":
                with torch.no_grad():
                    (largest.to_local() if sharded else largest).mul_(value)
        before = snapshot(self)
        try:
            return take(self, batches, speed)
        finally:
            same = all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, snapshot(self), strict=True))
            print("nothing touched" if same else "TOUCHED", flush=True)
            for handle in handles:
                handle.remove()

    engine.Engine.update = update


@pytest.fixture
def unchanged_engine(monkeypatch):
    monkeypatch.setattr(engine.Engine, "update", engine.Engine.update)  # puts it back at the end


@pytest.mark.parametrize("model", ["test_vit", slow("test_resnest_va")])  # the second has running statistics
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("unchanged_engine")
def test_nan_stops_before_the_optimizer_step(folder_data, run, capsys, model, place):
    poison(place)
    code, folder = run("r", "--data", folder_data, *SHORT, model=model)
    assert code == 1
    output = capsys.readouterr()
    assert "in epoch 2, update 2 of 4 (rank 0: " in output.err
    assert ("weight " if place == "weight" else "gradient of ") in output.err
    assert "Traceback" not in output.err
    assert "nothing touched" in output.out
    assert len(rows(folder)) == 1
    assert (folder / "curves.png").exists()


@pytest.mark.parametrize("place", ["input", slow("logits"), slow("loss"), "gradient"])
@pytest.mark.usefixtures("unchanged_engine")
def test_skip_drops_one_update_and_goes_on(folder_data, run, capsys, place):
    poison(place)
    code, folder = run("r", "--data", folder_data, *SHORT, "--nonfinite", "skip", model="test_resnest_va")
    assert code == 0
    assert "nothing touched" in capsys.readouterr().out
    assert [row["skipped"] for row in rows(folder)] == ["0", "1"]
    assert all(np.isfinite(float(row[key])) for row in rows(folder) for key in ("train_loss", "eval_loss", "ema_loss"))


@pytest.mark.usefixtures("unchanged_engine")
def test_skip_gives_up_on_a_broken_weight(folder_data, run, capsys):
    poison("weight")
    code, _ = run("r", "--data", folder_data, *SHORT, "--nonfinite", "skip", "--max-skips", 2)
    assert code == 1
    assert "in epoch 2, update 4 of 4 (rank 0: weight " in capsys.readouterr().err


@pytest.mark.usefixtures("unchanged_engine")
def test_float16_overflow_lowers_the_scale_instead(folder_data, run, capsys):
    """A finite loss with infinite gradients: no reason to stop."""
    poison("gradient", value=float("inf"))
    code, folder = run("r", "--data", folder_data, *SHORT, "--amp", "float16")
    assert code == 0
    assert "nothing touched" in capsys.readouterr().out
    skipped = int(rows(folder)[-1]["skipped"])  # the first updates may overflow by themselves
    state = json.loads(next(folder.glob("checkpoints/00000008/state.json")).read_text())
    assert skipped >= 1
    assert state["scaler"]["scale"] == 65536 / 2**skipped


FEW = (("ddp", "logits"), ("ddp", "gradient"), ("fsdp2", "gradient"), ("fsdp2", "weight"))


@pytest.mark.parametrize(
    ("engine_name", "place"), [*FEW, *(slow(*c) for c in itertools.product(("ddp", "fsdp2"), PLACES) if c not in FEW)]
)
def test_all_ranks_stop_for_one(folder_data, launch, engine_name, place):
    processes = launch(
        *("--data", folder_data, *SHORT, "--engine", engine_name),
        size=2,
        change=functools.partial(poison, place, rank=1),
    )
    assert processes.wait() == [1, 1], processes.output()
    output = processes.output()
    assert output.count("nothing touched") == 2
    assert output.count("error: expected a finite loss and gradient") == 1
    assert "in epoch 2, update 2 of 4 (rank " in output


def test_one_rank_skips_with_the_others(folder_data, launch, tmp_path):
    change = functools.partial(poison, "loss", rank=1)
    processes = launch("--data", folder_data, *SHORT, "--nonfinite", "skip", "--name", "r", size=2, change=change)
    assert processes.wait() == [0, 0], processes.output()
    assert processes.output().count("nothing touched") == 2
    assert rows(tmp_path / "out" / "r")[-1]["skipped"] == "1"


UNREADABLE = (
    *("truncated.jpg", "empty.jpg", "text.png"),
    *("bomb.png", "checksum.png", "zero.png", "pickle.jpg"),
)


@pytest.fixture
def dirty_data(tmp_path):
    """1000 training images, 21 of seven unreadable kinds; 3 of 40 test images unreadable."""
    rng = np.random.default_rng(0)
    root, bad = tmp_path / "dirty", []
    for split, count in (("train", 1000 - 21), ("val", 37)):
        for index in range(count):
            name, colour = (("red", (200, 60, 60)), ("blue", (60, 60, 200)))[index % 2]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(colour, 40, (24, 24, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / split / name / f"{index:04d}.png")
    for split, copies in (("train", 3), ("val", 1)):
        for name in UNREADABLE[: 7 if split == "train" else 3]:
            for copy in range(copies):
                path = root / split / "red" / f"{random.Random(f'{name}{copy}').randrange(1000):04d}_{name}"
                bad.append(path)
                path.write_bytes(BAD[name][0])
    return root, bad


@pytest.mark.parametrize(("size", "workers"), [(1, 1), (2, 0)])
def test_thousand_images_with_seven_kinds_of_bad_ones(dirty_data, launch, tmp_path, size, workers):
    root, bad = dirty_data
    options = ("--img-size", 32, "--batch-size", 40, "--epochs", 2, "--warmup-epochs", 0, "--max-bad", 0.03)
    processes = launch("--data", root, *options, "--name", "r", "--workers", workers, size=size)
    assert processes.wait() == [0] * size, processes.output()
    output = processes.output()
    assert f"{1000} training and 40 test images" in output
    named = [line for line in output.splitlines() if line.startswith("unreadable image: ")]
    for path in bad:
        assert len([line for line in named if str(path) in line]) == 1, (path, named)
    assert len(named) == len(bad) == 24
    assert all(line.endswith(")") and "(" in line for line in named)
    log = rows(tmp_path / "out" / "r")
    assert [row["bad_images"] for row in log] == ["24", "24"]
    # 37 readable test images count, no substitute: every accuracy is a multiple of 1/37.
    hits = float(log[-1]["top1"]) * 37 / 100
    assert hits == pytest.approx(round(hits), abs=1e-3)


def test_too_many_bad_images_stop_all_ranks_alike(dirty_data, launch):
    root, _ = dirty_data
    options = ("--img-size", 32, "--batch-size", 40, "--epochs", 1, "--warmup-epochs", 0, "--max-bad", 0.01)
    processes = launch("--data", root, *options, size=2)
    assert processes.wait() == [2, 2], processes.output()
    assert "expected at most 1.0% unreadable training images, got" in processes.output()


def test_a_gpu_out_of_memory_is_said_with_its_cure(folder_data, run, monkeypatch, capsys):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.Engine, "_backward", full)
    code, folder = run("r", "--data", folder_data, *SHORT)
    assert code == 1
    assert "try a smaller --micro-batch" in capsys.readouterr().err
    assert not list(folder.glob("checkpoints/*"))


def test_shares_are_whole_and_named_when_they_cannot_be():
    from visattn.train.config import Config
    from visattn.train.distributed import World
    from visattn.train.errors import ConfigError

    cpu = torch.device("cpu")
    assert Batches(1000, Config(batch_size=96, micro_batch=10), World(0, 2, cpu)).parts == 6  # 48 as 6 x 8
    with pytest.raises(ConfigError, match=r"expected a multiple of the 3 processes, got 64; try --batch-size 66"):
        Batches(1000, Config(batch_size=64), World(0, 3, cpu))
    with pytest.raises(ConfigError, match=r"expected at most the 40 training images, got 64"):
        Batches(40, Config(batch_size=64), World(0, 1, cpu))
    with pytest.raises(ConfigError, match=r"an even share for mixup and cutmix, which mix pairs, got 3 images"):
        Batches(1000, Config(batch_size=6, mixup=0.8), World(0, 2, cpu))


@pytest.mark.parametrize(("size", "micro", "share"), [(23, 11, 24), (1, None, 2), (7, 1, 8)])
def test_one_image_is_too_few_for_batch_norm(refused, size, micro, share):
    options = ("--batch-size", size, "--micro-batch", micro) if micro else ("--batch-size", size)
    said = refused(*options, model="test_resnest_va")
    assert "expected at least 2 images in a forward pass of test_resnest_va in training, got 1: " in said
    assert f"; try --batch-size {share} and an even --micro-batch" in said


@pytest.mark.parametrize(
    ("model", "options"), [("test_vit", ()), ("test_resnest_va", ("--train-only", "head.*", "fc.*"))]
)
def test_one_image_is_enough_for_others(folder_data, tmp_path, model, options):
    """For models without batch norm, and where it is frozen; the trial leaves no trace in the statistics."""
    made = build("--data", folder_data, "--output", tmp_path, *SHORT, "--model", model, "--batch-size", 1, *options)
    for name, buffer in made.engine.model.named_buffers():
        assert "num_batches" not in name or buffer == 0
    made.engine.update(made.engine.loaders.begin(0, 0), Speed())
