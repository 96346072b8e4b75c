"""What only one process meets: said, and the end of all."""

import functools
import multiprocessing
import os

import pytest
from runs import SMALL, slow

from visattn.train import distributed
from visattn.train.engine import Engine


def lose_images(rank):
    """On one rank no image can be read."""
    from visattn.train.loader import TrainingImages

    read = TrainingImages.read
    TrainingImages.read = lambda self, index: None if int(os.environ["RANK"]) == rank else read(self, index)


@pytest.mark.parametrize(("workers", "rank"), [(1, 1), slow(1, 0), slow(0, 1)])
def test_what_one_rank_finds_wrong_is_said_and_ends_the_other(folder_data, launch, workers, rank):
    change = functools.partial(lose_images, rank)
    processes = launch("--data", folder_data, *SMALL, "--epochs", 1, "--workers", workers, size=2, change=change)
    codes = processes.wait(60)
    assert codes[rank] == 2, processes.output()
    assert codes[1 - rank] == 1
    said = f"{'rank 1: ' if rank else ''}error: expected readable training images, got 32 unreadable ones from "
    assert sum(line.startswith(said) for line in processes.output().splitlines()) == 1, processes.output()
    assert "Traceback" not in processes.output()


def meet_bad_images_everywhere():
    """Both ranks have met the same unreadable image, twice the --max-bad of 1 by their own counts."""
    from visattn.train import loader

    make = loader.Images.__init__

    def marked(self, *args):
        make(self, *args)
        if isinstance(self, loader.TrainingImages):
            self.bad[3] = 1

    loader.Images.__init__ = marked


def test_an_unreadable_image_that_all_ranks_meet_counts_once(folder_data, launch):
    options = ("--data", folder_data, *SMALL, "--epochs", 2, "--max-bad", 0.01)
    processes = launch(*options, size=2, change=meet_bad_images_everywhere)
    assert processes.wait() == [0, 0], processes.output()
    assert processes.output().count("unreadable image: ") == 1


def test_a_killed_loader_process_is_said(folder_data, launch):
    options = ("--data", folder_data, *SMALL, "--epochs", 500, "--workers", 1, "--name", "r")
    processes = launch(*options, change=functools.partial(kill_loader, 6))
    assert processes.wait() == [2], processes.output()
    assert "error: expected loader processes that go on, got" in processes.output()
    assert "Traceback" not in processes.output()


def kill_loader(update):
    """SIGKILL, as from a system without memory."""
    take = Engine.update

    def after(self, batches, speed):
        if self.state.update == update:
            for child in multiprocessing.active_children():
                child.kill()
        return take(self, batches, speed)

    Engine.update = after


def test_a_device_that_one_rank_lacks_is_said(folder_data, launch):
    processes = launch("--data", folder_data, *SMALL, size=2, change=take_device)
    assert processes.wait(60) == [2, 2], processes.output()
    assert processes.output().count("error: --device: expected a usable device, got 'abacus'") == 1


def take_device():
    pick = distributed.pick_device
    distributed.pick_device = lambda name, rank: pick("abacus" if rank else name, rank)
