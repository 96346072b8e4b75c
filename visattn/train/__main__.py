"""`python -m visattn.train`, `torchrun -m visattn.train`: parse, build, train, report."""

import os
import sys
import time

from visattn.train.start import begin

if __name__ == "__main__":
    begin()

import torch
import yaml

import visattn  # noqa: F401  registers its models with timm
from visattn.train import checkpoint, distributed, signals
from visattn.train.arguments import parse
from visattn.train.config import recipe
from visattn.train.errors import DataError, DeviceMemoryError, Interrupted, PeerError, TrainError, exhausted
from visattn.train.lr_find import find_lr
from visattn.train.metrics import make_console
from visattn.train.run import Run, build, report, train


def main(argv: list[str] | None = None) -> int:
    """Run the trainer; returns the exit code."""
    start = time.perf_counter()
    signals.end_at_once()
    rank = distributed.world_info_from_env()[1]
    console = make_console(enabled=rank == 0)
    run = None
    try:
        config = parse(argv)
        if config.print_config:
            if rank == 0:
                print(yaml.safe_dump(recipe(config), sort_keys=False), end="")
            return 0
        world = distributed.start(config)
        run = build(config, world, console)
        try:
            with run.lock:
                signals.ask(run.engine)
                if config.lr_find:
                    find_lr(run)
                else:
                    train(run)
                    report(run, time.perf_counter() - start)
        except Interrupted as error:
            fail(Interrupted(f"{error}{_goes_on(run)}"), rank)
            return run.engine.stop or error.exit_code
        run = None  # which holds the process group, and which the handlers of signals hold
        signals.end_at_once()
        distributed.stop()
        return 0
    except TrainError as error:
        return fail(error, rank)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        return fail(
            DeviceMemoryError(
                f"expected memory for a forward and a backward pass, got: {reason}; try a smaller --micro-batch, "
                "--grad-checkpointing, or --engine fsdp2"
            ),
            rank,
        )
    except (MemoryError, OSError, RuntimeError) as error:
        if problem := exhausted(error):
            return fail(problem, rank)
        reason = str(error).partition("\n")[0]
        if reason.startswith("DataLoader worker"):
            text = f"expected loader processes that go on, got: {reason}; try fewer --workers, or more shared memory"
            return fail(DataError(text), rank)
        if not distributed.peer_lost(error):
            raise
        return fail(PeerError(f"expected all processes to go on, got: {reason}; try --resume once all can run"), rank)
    except KeyboardInterrupt:
        print(f"interrupted{_goes_on(run)}", file=sys.stderr)
        return 130


def _goes_on(run: Run | None) -> str:
    """How to continue a run that has ended early, if it can be."""
    if run and checkpoint.exists(run.folder):
        return f"; --resume {run.folder} goes on from there"
    return " before the first checkpoint"


def fail(error: TrainError, rank: int) -> int:
    """Say what went wrong, once per process that has something to say."""
    if isinstance(error, PeerError) or distributed.first_to_say(str(error)):
        print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr)
    return error.exit_code


def finish(code: int) -> None:
    """Exit; at once if something failed, because other processes may be gone and are not to be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code and distributed.dist.is_initialized():
        signals.kill_loaders()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    finish(main())
