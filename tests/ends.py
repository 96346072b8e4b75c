"""`python tests/ends.py PROGRAM ARGUMENTS`: run it, and say which threads of the process group outlive it."""

import atexit
import runpy
import sys
from pathlib import Path


def left() -> None:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("threads left:", sorted(name for name in names if "gloo" in name))


atexit.register(left)  # first in, so the last that runs before Python ends
program = sys.argv.pop(1)
if program.endswith(".py"):
    sys.path.insert(0, str(Path(program).parent))
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
