"""A session of measurements that ends in time: tasks in steps, results on disk after each, other processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import report
from report import number

ROOT = Path(__file__).parents[1]


@dataclass
class Row:
    """A measurement: a time, another figure with its unit, or why there is none."""

    step: str
    case: str
    what: str
    us: float | None = None
    figure: float | None = None
    note: str = ""


COLUMNS = ("step", "case", "what", "us", "figure", "note")
TEXT = """# A session on a GPU

`{command}` ({setting}).
"""


def cells(r: Row) -> list[str]:
    return [r.step, r.case, r.what, number(r.us, ".1f"), number(r.figure, ".4g"), r.note.replace("|", "/")[:300]]


@dataclass
class Task:
    """A case of a step, after which results are written; `always` whatever the step's limit. `run` returns its rows."""

    step: str
    name: str
    run: Callable[[], Iterable[Row]]
    always: bool = False


class Session:
    """Tasks one after the other, and the rows of all: written after each.

    A step begins nothing `limits[step]` seconds after it began; what it has left then is done at the end.
    """

    def __init__(
        self, out: Path, seconds: float, limits: dict[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.out, self.limits, self.clock = out, limits, clock
        self.end = clock() + seconds
        self.rows: list[Row] = []
        self.setting: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)

    def keep(self, setting: dict[str, str], steps: Sequence[str]) -> None:
        """Go on from the rows of other steps that lie in `out`, as far as they are of this setting."""
        self.setting = setting
        found = report.earlier(self.out / "session", setting)
        self.rows = [Row(**row) for row in found if row["step"] not in steps]

    def left(self) -> float:
        return self.end - self.clock()

    def go(self, tasks: Sequence[Task], perform: Callable[[Task], Iterable[Row]] = lambda task: task.run()) -> None:
        late: list[Task] = []
        ends: dict[str, float] = {}
        for task in tasks:
            end = ends.setdefault(task.step, self.clock() + self.limits[task.step])
            if self.clock() > end and not task.always:
                late.append(task)
            else:
                self.do(task, perform)
        for task in late:
            self.do(task, perform)

    def do(self, task: Task, perform: Callable[[Task], Iterable[Row]]) -> None:
        start = self.clock()
        if self.left() <= 0:
            rows = [Row(task.step, task.name, "all", note="not measured: no time left")]
        else:
            try:
                rows = list(perform(task))
            except Exception as error:
                rows = [Row(task.step, task.name, "all", note=report.failure(error))]
        self.rows += [*rows, Row(task.step, task.name, "seconds it took", figure=self.clock() - start)]
        self.write()
        print(f"[{self.left():.0f} s left] {task.step} {task.name}: {self.clock() - start:.1f} s", flush=True)

    def write(self) -> None:
        report.write(self.rows, COLUMNS, cells, TEXT, "bench_gpu.py", None, self.out / "session", self.setting)


class Program:
    """Another process, whose output goes to the end of the session's log when it has ended or is ended."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        streams = {"stdout": self.output, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **streams
        )

    def finish(self, session: Session, seconds: float) -> tuple[int | None, str]:
        """Its exit status, None if it had not ended after so many seconds, and its output."""
        status: int | None = None
        try:
            status = self.process.wait(max(0.0, min(seconds, session.left())))
        except subprocess.TimeoutExpired:
            self.stop()
        self.output.seek(0)
        text = self.output.read()
        with (session.out / "session.log").open("a") as log:
            log.write(f"\n=== {' '.join(map(str, self.process.args))}\n{text}")
        return status, text

    def stop(self) -> None:
        """End it with all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def outcomes(step: str, name: str, status: int | None, text: str) -> list[Row]:
    """A row per test that failed, and how many passed."""
    words = "(PASSED|FAILED|ERROR)"
    found = dict(re.findall(rf"::(.+?) {words}", text))  # in one process
    found |= {test: outcome for outcome, test in re.findall(rf"{words} \S+?::(.+?)\s*$", text, re.MULTILINE)}
    rows = [Row(step, name, test, note=outcome) for test, outcome in found.items() if outcome != "PASSED"]
    passed = sum(outcome == "PASSED" for outcome in found.values())
    end = "ended by the limit" if status is None else f"FAILED: exit status {status}" if status else ""
    return [*rows, Row(step, name, "tests passed", figure=passed or None, note=end)]
