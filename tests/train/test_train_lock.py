"""One run at a time in a folder: the second is refused, and whatever the first one leaves does not stand in the way."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import time

import pytest
from runs import PLAIN, SMALL, newest

from visattn.train import engine, validate
from visattn.train.config import Config
from visattn.train.errors import OutputError
from visattn.train.lock import FolderLock
from visattn.train.metrics import make_console
from visattn.train.outputs import open_folder


@pytest.fixture
def holder():
    """Another process that holds a folder, and has a loader process of its own; returns its id."""
    context, started = multiprocessing.get_context("fork"), []

    def hold(folder, ready):
        FolderLock().take(folder)
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        ready.send(child.pid)
        time.sleep(60)

    def call(folder):
        mine, theirs = context.Pipe()
        process = context.Process(target=hold, args=(folder, theirs))
        process.start()
        started.extend([process.pid, mine.recv()])
        return process

    yield call
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_changes_nothing(finished, run, holder, capsys):
    process = holder(finished)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for options in (("--resume", finished), ("--resume", newest(finished)), ()):
        assert run("r", *options)[0] == 2
        error = capsys.readouterr().err
        assert f"where process {process.pid} on {socket.gethostname()} does; try again" in error
        assert error.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert validate.main(["--run", str(finished)]) == 0


def test_a_killed_run_and_its_loader_process_hold_nothing(finished, run, holder):
    process = holder(finished)
    process.kill()
    process.join()
    assert (finished / ".lock").exists()
    assert run("r", "--resume", finished)[0] == 0
    assert not (finished / ".lock").exists()


def test_a_failed_run_lets_go(finished, run):
    assert run("r", "--resume", finished, "--lr", 0.01)[0] == 2
    assert not (finished / ".lock").exists()


@pytest.mark.parametrize("taken", [False, True])
def test_a_folder_that_was_deleted_is_taken_again(tmp_path, holder, taken):
    folder, mine = tmp_path / "r", FolderLock()
    assert mine.take(folder)
    shutil.rmtree(folder)
    assert not mine.holds()
    if taken:
        holder(folder)
        with pytest.raises(OutputError, match="expected a folder that no other run writes to"):
            mine.take(folder)
        mine.release()  # not theirs
        assert (folder / ".lock").exists()
    else:
        assert mine.take(folder)
        assert mine.holds()


def test_a_run_whose_folder_another_has_taken_ends_without_touching_it(
    folder_data, run, tmp_path, holder, monkeypatch, capsys
):
    """Deleted and begun anew by somebody while an epoch was trained."""
    folder, evaluate = tmp_path / "out" / "r", engine.Engine.evaluate

    def slow(self, ema=False):
        shutil.rmtree(folder)
        holder(folder)
        return evaluate(self, ema)

    monkeypatch.setattr(engine.Engine, "evaluate", slow)
    assert run("r", "--data", folder_data, *PLAIN, "--epochs", 1)[0] == 2
    assert "expected a folder that no other run writes to" in capsys.readouterr().err
    assert os.listdir(folder) == [".lock"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks(tmp_path, monkeypatch, capsys, code):
    """A process of this host is known by its id; of other hosts nothing is known, which is said."""

    def none(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", none)
    here, gone = socket.gethostname(), multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    for number, text in enumerate((f"{gone.pid} {here}\n", f"{os.getppid()} elsewhere\n", "\x1b[31m\n", "")):
        config = Config(output=tmp_path, name=str(number))
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / ".lock").write_text(text)
        open_folder(config, "x", FolderLock(), make_console())
        assert f"warning: {tmp_path / str(number)} is on a file system without locks" in capsys.readouterr().out
    (tmp_path / ".lock").write_text(f"{os.getppid()} {here}\n")
    with pytest.raises(OutputError, match=f"process {os.getppid()} on {here}"):
        FolderLock().take(tmp_path)


def test_two_processes_resume_one_run(folder_data, launch, tmp_path):
    """As if started twice by mistake, each of two ranks."""
    folder = tmp_path / "out" / "r"
    first = launch("--data", folder_data, *SMALL, "--epochs", 500, "--name", "r", size=2)
    while not (folder / "log.csv").exists() and first.ranks[0].is_alive():
        time.sleep(0.01)
    second = launch("--resume", folder, size=2)
    assert second.wait() == [2, 2], second.output()
    assert second.output().count("error: ") == 1
    assert f"where process {first.ranks[0].pid} on {socket.gethostname()} does" in second.output()
    first.kill(1)
    assert first.wait() == [1, -9]
    again = launch("--resume", folder, size=2)
    while "epoch" not in again.output() and again.ranks[0].is_alive():
        time.sleep(0.01)
    again.ranks[0].terminate()
    assert again.wait() == [143, 143], again.output()
