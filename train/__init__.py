"""The trainer: `python -m train`. It imports visattn, is never imported by it, and is not installed."""

import os

# Before torch loads OpenMP: threads that wait should sleep, not spin. On two cores that another process shares,
# spinning made an epoch of the default run up to 60 times slower (108 s against 1.8 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
