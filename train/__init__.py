"""`python -m train` in a clone: the trainer of `visattn.train`. README.md beside this file is its manual."""

import os
import runpy
import sys
from pathlib import Path

# Before torch loads OpenMP: threads that wait should sleep, not spin. On two cores that another process shares,
# spinning made an epoch of the default run up to 60 times slower (108 s against 1.8 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Importing visattn takes seconds and memory: an end in that time is said in one line too. These files need nothing.
_trainer = Path(__file__).parents[1] / "visattn" / "train"
runpy.run_path(str(_trainer / "signals.py"))["end_at_once"]()
sys.excepthook = runpy.run_path(str(_trainer / "errors.py"))["say_exhausted"]
