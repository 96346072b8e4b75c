"""A run that is killed, stopped or moved to other processes goes on as if nothing had happened."""

import csv
import functools
import json
import os
import pkgutil
import random
import shutil
import signal
import time

import pytest
import torch
from runs import SMALL, assert_same_tensors, newest, rows, slow, tensors

from visattn.train import checkpoint
from visattn.train import run as trainer
from visattn.train.config import FREE_ON_RESUME
from visattn.train.engine import Engine

# Every source of randomness at once: shuffling, crops, erasing, mixing, stochastic depth; and an average.
STOCHASTIC = ("--img-size", 32, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1, "--checkpoint-every", 1)
STOCHASTIC += ("--mixup", 0.8, "--cutmix", 1, "--reprob", 0.5, "--drop-path", 0.2, "--layer-decay", 0.8)
STOCHASTIC += ("--ema-decay", 0.9, "--auto-augment", "rand-m9-mstd0.5-inc1")
UPDATES = 4 * 4
TIMES = ("images_per_s", "seconds", "data_wait", "memory_gb", "gflops_per_s")


def state_of(folder):
    """Everything that a run leaves but for times: the last checkpoint, the log and the exported weights."""
    values = json.loads((newest(folder) / "state.json").read_text())
    for key in FREE_ON_RESUME:
        values["recipe"].pop(key, None)
    for row in values["progress"]["history"]:
        for key in TIMES:
            row.pop(key)
    with open(folder / "log.csv") as file:
        log = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    exported = [(folder / name).read_bytes() for name in ("model.safetensors", "model_ema.safetensors")]
    return newest(folder).name, values, log, exported


def assert_same(one, other):
    assert state_of(one) == state_of(other)
    assert_same_tensors(one, other)
    assert {key.partition(".")[0] for key in tensors(one)} == {"model", "ema", "optimizer"}


@pytest.mark.parametrize(("before", "after"), [(2, 1), slow(0, 0), slow(2, 0), slow(0, 2)])
def test_a_run_stopped_in_mid_epoch_is_bitwise_the_uninterrupted_one(folder_data, run, monkeypatch, before, after):
    options = ("--data", folder_data, *STOCHASTIC)
    code, whole = run("whole", *options)
    assert code == 0
    with monkeypatch.context() as patch:
        bars = []

        def interrupt(bar, status):
            bars.append(status)
            if len(bars) == 7:
                raise KeyboardInterrupt

        patch.setattr(trainer.EpochBar, "step", interrupt)
        code, parts = run("parts", *options, "--workers", before)
    assert code == 130
    assert newest(parts).name == "00000006"  # of update 7 nothing is left
    torch.rand(7)  # a new process would not be where the old one stopped
    code, _ = run("parts", "--resume", parts, "--workers", after)
    assert code == 0
    assert_same(whole, parts)


def die_at(monkeypatch, owner, name, count):
    """As a kill would leave it: the call with this number does not happen. Half a file stays behind."""
    real, calls = getattr(owner, name), []

    def die(*args):
        calls.append(args)
        if len(calls) == count:
            if name == "write_atomic":
                args[0].with_name(f".{args[0].name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(owner, name, die)


# Two epochs: each evaluates twice, and writes two files before that and three after it.
@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(Engine, "evaluate", 1), (Engine, "evaluate", 4), *[(checkpoint, "write_atomic", 7 + k) for k in (1, 2, 3)]],
)
def test_a_kill_in_or_after_an_evaluation_loses_no_update(folder_data, run, monkeypatch, owner, name, count):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 32, "--epochs", 2, "--warmup-epochs", 0)
    options += ("--ema-decay", 0.5, "--reprob", 0.5)
    assert run("whole", *options)[0] == 0
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, count)
        code, parts = run("parts", *options)
    assert code == 130
    assert newest(parts).name == f"{1 if count == 1 else 2:08d}"
    with monkeypatch.context() as patch:
        updates = []
        take = Engine.update
        patch.setattr(Engine, "update", lambda *args: updates.append(1) or take(*args))
        assert run("parts", "--resume", parts)[0] == 0
    assert len(updates) == (1 if count == 1 else 0)
    assert_same(parts.parent / "whole", parts)


def test_a_signal_in_an_evaluation_ends_it(folder_data, run, monkeypatch, capsys):
    real, calls = Engine.evaluate, []

    def evaluate(self, ema):
        calls.append(ema)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, ema)

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    code, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 3)
    assert code == 143
    assert f"error: stopped in the evaluation after update 8; --resume {folder} goes on" in capsys.readouterr().err
    assert len(rows(folder)) == 1
    assert newest(folder).name == "00000008"


def kill(processes, rng):
    processes.kill()


def strike_all(processes, rng):
    """Any of the signals that end a run, to its loaders too."""
    processes.signal(rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL]))


def kill_at_random(launch, options, name, folder, size, kills, seed, strike=kill, change=None, done=2.0):
    """Kill the run `name` at random moments and let it go on each time, until it has survived `kills` of them."""
    rng = random.Random(seed)
    survived = finished = 0
    while survived < kills:
        broken = change and functools.partial(change, rng.random())
        processes = launch(*options, "--name", name, "--resume", "auto", size=size, change=broken)
        if not change:
            time.sleep(rng.uniform(0.0, done))
            alive = all(process.is_alive() for process in processes.ranks)
            strike(processes, rng)
        codes = processes.wait()
        if all(code != 0 for code in codes) and (change or alive):
            survived += 1
            assert "Traceback" not in processes.output(), processes.output()
        else:
            assert set(codes) <= {0, -9}, processes.output()
            finished += 1
        if folder.exists() and 0 in codes and survived < kills:
            shutil.rmtree(folder)  # it ended before the kill: from the start again
    processes = launch(*options, "--name", name, "--resume", "auto", size=size)
    assert set(processes.wait()) == {0}, processes.output()
    return finished


@pytest.mark.parametrize(("size", "kills"), [(1, 14), (2, 6), slow(1, 150), slow(2, 60)])
def test_no_kill_loses_or_changes_a_run(folder_data, launch, tmp_path, size, kills):
    options = ("--data", folder_data, *STOCHASTIC)
    whole = launch(*options, "--name", "whole", size=size)
    assert set(whole.wait()) == {0}, whole.output()
    start = time.perf_counter()
    kill_at_random(launch, options, "killed", tmp_path / "out" / "killed", size, kills, seed=kills)
    print(f"{kills} kills in {time.perf_counter() - start:.0f} s")
    assert_same(tmp_path / "out" / "whole", tmp_path / "out" / "killed")


def die_in(owners, chance):
    """SIGKILL at one of the next calls of some functions, with a part of the work done."""
    left = [1 + int(chance * 12)]

    def wrap(owner, name):
        real = getattr(owner, name)

        def call(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                if name == "rmtree":
                    next((path.unlink() for path in sorted(args[0].glob("*"))), None)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, call)

    for owner, name in owners:
        wrap(pkgutil.resolve_name(owner), name)


KINDS = {
    "random": {},
    "group": {"strike": strike_all},
    "validation": {"change": functools.partial(die_in, [("timm.task:ClassificationEvaluator", "update")])},
    "pruning": {"change": functools.partial(die_in, [("pathlib:Path", "rename"), ("shutil", "rmtree")])},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "kills"), [("random", 50), ("group", 30), ("validation", 10), ("pruning", 10)])
def test_a_hundred_kills_of_all_kinds_lose_and_change_nothing(folder_data, launch, tmp_path, kind, kills):
    """All: `python -m pytest -n 0 -m slow tests/train/test_train_resume.py -k hundred -s`."""
    options = ("--data", folder_data, *STOCHASTIC, "--keep-checkpoints", 1, "--workers", 2 if kind == "group" else 0)
    whole = launch(*options, "--name", "whole")
    assert whole.wait() == [0], whole.output()
    start = time.perf_counter()
    folder = tmp_path / "out" / "killed"
    more = kill_at_random(launch, options, "killed", folder, 1, kills, seed=kills, **KINDS[kind])
    print(f"{kind}: {kills} kills and {more} complete runs in {time.perf_counter() - start:.0f} s")
    assert_same(tmp_path / "out" / "whole", folder)


def test_sigterm_saves_and_ends(folder_data, launch, tmp_path):
    options = ("--data", folder_data, *STOCHASTIC, "--checkpoint-every", 0)
    whole = launch(*options, "--name", "whole", size=2)
    processes = launch(*options, "--name", "stopped", size=2)
    folder = tmp_path / "out" / "stopped"
    while not (folder / "log.csv").exists() and processes.ranks[0].is_alive():
        time.sleep(0.01)
    processes.ranks[1].terminate()  # one is enough: all agree
    assert processes.wait() == [143, 143], processes.output()
    assert "--resume" in processes.output()
    name = newest(folder).name
    assert int(name) < UPDATES
    assert set(whole.wait()) == {0}
    again = launch("--resume", folder, size=2)
    assert set(again.wait()) == {0}, again.output()
    assert f"resumed after update {int(name)}" in again.output()
    assert_same(tmp_path / "out" / "whole", folder)


@pytest.mark.parametrize(
    ("engine", "first", "then"), [("fsdp2", 1, 2), ("fsdp2", 2, 1), ("ddp", 1, 2), slow("ddp", 2, 1)]
)
def test_other_numbers_of_processes_go_on_with_the_same_images(folder_data, launch, tmp_path, engine, first, then):
    """Without per-process draws (stochastic depth, mixing) even the losses agree."""
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 2, "--warmup-epochs", 0)
    options += ("--lr", 1e-3, "--engine", engine, "--auto-augment", "rand-m9-mstd0.5-inc1", "--ema-decay", 0.9)
    whole = launch(*options, "--name", "whole", size=first)
    assert set(whole.wait()) == {0}, whole.output()
    folder = tmp_path / "out" / "moved"
    shutil.copytree(tmp_path / "out" / "whole", folder)
    shutil.rmtree(newest(folder))  # back to the end of epoch 1
    moved = launch("--resume", folder, size=then)
    assert set(moved.wait()) == {0}, moved.output()
    name, values, *_ = state_of(folder)
    _, expected, *_ = state_of(tmp_path / "out" / "whole")
    assert name == "00000008"
    for key in ("train_loss", "eval_loss", "top1", "ema_loss"):
        got = [row[key] for row in values["progress"]["history"]]
        assert got == pytest.approx([row[key] for row in expected["progress"]["history"]], rel=1e-5), key


def test_other_images_are_not_taken_for_those_of_the_run(folder_data, run, capsys):
    code, folder = run("r", "--data", folder_data, *SMALL, "--epochs", 1)
    assert code == 0
    shutil.copy(folder_data / "train" / "red" / "0.png", folder_data / "train" / "red" / "more.png")
    assert run("r", "--resume", folder, "--epochs", 2)[0] == 2
    assert "expected the 32 and 12 training and test images of the run, got 33 and 12" in capsys.readouterr().err
