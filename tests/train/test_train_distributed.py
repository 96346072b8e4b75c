"""Several processes compute what one does, end together, and start again together."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from runs import column, rows, slow
from safetensors.torch import load_file

import visattn  # noqa: F401
from visattn.train.distributed import World, repeated_blocks

# One update an epoch: log.csv holds the loss of each.
DRAWN = ("--img-size", 32, "--batch-size", 32, "--warmup-epochs", 2, "--lr", 1e-3, "--seed", 3)
DRAWN += ("--auto-augment", "rand-m9-mstd0.5-inc1", "--grad-clip", 1.0, "--ema-decay", 0.9, "--aug-repeats", 2)


EXTRA = ("--micro-batch", 5, "--grad-checkpointing", "--channels-last")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("updates", "extra"), [(8, EXTRA), slow(20, EXTRA), slow(20, ()), slow(20, EXTRA[:2]), slow(20, EXTRA[2:])]
)
def test_two_processes_equal_one(folder_data, run, launch, tmp_path, engine, updates, extra):
    options = ("--data", folder_data, *DRAWN, "--epochs", updates)
    code, single = run("single", *options)
    assert code == 0
    assert min(column(single, "train_loss")) < 0.8 * column(single, "train_loss")[0]
    processes = launch(*options, *extra, "--engine", engine, "--name", "two", size=2)
    assert processes.wait() == [0, 0], processes.output()
    two = tmp_path / "out" / "two"
    for key, tolerance in (("train_loss", 1e-5), ("eval_loss", 1e-5), ("ema_loss", 1e-5), ("grad_norm", 1e-4)):
        assert column(two, key) == pytest.approx(column(single, key), rel=tolerance), key
    assert column(two, "top1") == column(single, "top1")
    one, other = (load_file(folder / "model.safetensors") for folder in (single, two))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert "2 (" not in "".join(row["epoch"] for row in rows(two))
    assert processes.output().count("test accuracy") == 1  # one of them speaks


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_processes_hold_the_same_running_statistics(folder_data, launch, engine):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 32, "--epochs", 2, "--warmup-epochs", 0)
    processes = launch(
        *options, "--ema-decay", 0.9, "--engine", engine, size=2, model="test_resnet", change=print_statistics
    )
    assert processes.wait() == [0, 0], processes.output()
    lines = [line for line in processes.output().splitlines() if line.startswith("statistics ")]
    assert len(lines) == 2 * 2
    assert all(lines.count(line) == 2 for line in lines), lines
    assert len(set(lines)) == 2
    refused = launch(*options, "--sync-bn", size=2, model="test_resnet")
    assert refused.wait() == [2, 2]
    assert "--sync-bn: expected GPUs, got cpu" in refused.output()


def print_statistics():
    from visattn.train.engine import Engine

    take = Engine.update

    def update(self, *args):
        taken = take(self, *args)
        means = [buffer.double().sum() for name, buffer in self.model.named_buffers() if "running" in name]
        print(f"statistics {self.state.update} {sum(means).item()!r}", flush=True)
        return taken

    Engine.update = update


def test_uneven_test_images_count_once(folder_data, launch, run, tmp_path):
    """13 test images on 2 processes: one of them sees a padded last batch."""
    (folder_data / "val" / "red" / "extra.png").write_bytes((folder_data / "val" / "red" / "0.png").read_bytes())
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0)
    options += ("--lr", 1e-5)
    _, one = run("one", *options)
    processes = launch(*options, "--name", "two", size=2)
    assert processes.wait() == [0, 0], processes.output()
    assert column(tmp_path / "out" / "two", "eval_loss") == pytest.approx(column(one, "eval_loss"), rel=1e-5)
    assert column(tmp_path / "out" / "two", "top1") == column(one, "top1")
    hits = column(one, "top1")[0] * 13 / 100
    assert hits == pytest.approx(round(hits), abs=1e-3)


def sleep_at(update, rank, seconds):
    """One rank stops answering."""
    from visattn.train.engine import Engine

    take = Engine.update

    def slow(self, *args):
        if self.world.rank == rank and self.state.update == update:
            print("asleep", flush=True)
            time.sleep(seconds)
        return take(self, *args)

    Engine.update = slow


@pytest.mark.parametrize(("engine", "dead"), [("ddp", 0), ("fsdp2", 1), slow("ddp", 1), slow("fsdp2", 0)])
def test_a_killed_rank_ends_the_other(folder_data, launch, engine, dead):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 1000, "--engine", engine)
    processes = launch(*options, "--name", "r", size=2)
    while "epoch " not in processes.output() and processes.ranks[dead].is_alive():
        time.sleep(0.05)
    start = time.monotonic()
    processes.kill(dead)
    codes = processes.wait(60)  # None for one that is still there then
    print(f"the other ended after {time.monotonic() - start:.1f} s")
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1, processes.output()
    assert "error: expected all processes to go on, got: " in processes.output()


def test_a_rank_that_hangs_ends_the_other(folder_data, launch):
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 2, "--dist-timeout", 5)
    change = functools.partial(sleep_at, 5, 1, 600)
    processes = launch(*options, "--warmup-epochs", 0, size=2, change=change)
    while "asleep" not in processes.output() and processes.ranks[1].is_alive():
        time.sleep(0.05)
    processes.ranks[0].join(60)
    assert processes.ranks[0].exitcode == 1, processes.output()
    assert "error: expected all processes to go on, got: " in processes.output()
    processes.kill(1)


def test_torchrun_restarts_a_run_that_lost_a_process(folder_data, tmp_path):
    """The real launcher: a rank is killed, torchrun starts both again, --resume auto goes on, no thread is left."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ("--data", folder_data, "--img-size", 32, "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 0)
    options += ("--model", "test_vit", "--checkpoint-every", 1, "--output", tmp_path, "--name", "r", "--resume", "auto")
    running = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "tests/ends.py", "train", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "r" / "log.csv").exists() and running.poll() is None:
        time.sleep(0.05)
    for pid in children(running.pid)[1:2]:
        os.kill(pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=240)
    assert running.returncode == 0, output
    assert "resumed after update" in output
    assert output.count("threads left: []") == 2, output
    assert len(rows(tmp_path / "r")) == 3
    assert "test accuracy" in output


def children(pid):
    """Processes that `pid` has started, in their order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended
            number, _, rest = stat.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[1]) == pid:
                found.append(int(number))
    return sorted(found)


@pytest.mark.parametrize(
    "name", ["dinat_tiny", "biformer_tiny", "transnext_tiny", "maxvit_tiny_va", "overlock_t", "resnest50_va"]
)
def test_blocks_to_shard_cover_the_network(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = list(repeated_blocks(model))
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    share = sum(p.numel() for p in model.parameters() if id(p) in inside) / sum(p.numel() for p in model.parameters())
    assert len(blocks) == len({id(block) for block in blocks}) >= 11
    assert share > 0.8


def test_totals_of_one_process_are_its_values():
    world = World(0, 1, torch.device("cpu"))
    assert world.total([torch.tensor(1.5), 2.0, torch.tensor(True)]) == [1.5, 2.0, 1.0]
    assert world.gather("x") == ["x"]
