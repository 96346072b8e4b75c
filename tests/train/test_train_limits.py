"""A system that gives no more memory, threads or files: one sentence."""

import errno
import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import SMALL

from visattn.train import run as trainer
from visattn.train.errors import ConfigError
from visattn.train.loader import allow_files


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # what fork says
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 196608 bytes"),
        RuntimeError("could not create a primitive"),  # by oneDNN
    ],
)
def test_what_the_system_refuses_is_said(folder_data, run, monkeypatch, capsys, error):
    def refuse(config):
        raise error

    monkeypatch.setattr(trainer, "open_data", refuse)
    assert run("r", "--data", folder_data, *SMALL)[0] == 1
    said = capsys.readouterr().err
    assert said.startswith("error: expected enough memory, processes and open files, got: ")
    assert said.count("\n") == 1


def test_too_little_memory_for_the_libraries_is_said():
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-m", "train"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected enough memory, processes and open files, got: ")
    assert done.stderr.count("\n") == 1


def test_loader_processes_have_the_files_they_need(monkeypatch):
    limits = [(20, 40)]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.append(values))
    allow_files(0)
    allow_files(1)
    assert limits == [(20, 40), (36, 40)]
    with pytest.raises(ConfigError, match=r"--workers: expected 72 open files .* for 4 of them, got 40; try fewer"):
        allow_files(4)
