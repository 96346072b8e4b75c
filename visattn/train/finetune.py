"""`python -m visattn.train.finetune PRESET --model NAME --data DIR`: the trainer with configs/finetune/PRESET.yaml."""

import os
import sys
from pathlib import Path

from visattn.train.start import begin

if __name__ == "__main__":
    begin()

from visattn.train.__main__ import finish, main
from visattn.train.errors import shown

PRESETS = Path(__file__).parents[1] / "configs" / "finetune"


def arguments(argv: list[str]) -> list[str] | None:
    """The trainer's arguments; None unless the first one names a preset."""
    if not argv or not os.path.isfile(PRESETS / f"{argv[0]}.yaml"):
        return None
    return ["--config", str(PRESETS / f"{argv[0]}.yaml"), *argv[1:]]


def run(argv: list[str]) -> int:
    """Run the trainer; returns the exit code."""
    if (options := arguments(argv)) is not None:
        return main(options)
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    got = shown(argv[0]) if argv else "none"
    print(f"error: expected a preset, got {got}; try python -m visattn.train.finetune with {names}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    finish(run(sys.argv[1:]))
