"""`python -m visattn.train.finetune PRESET --model NAME --data DIR`: the trainer with configs/finetune/PRESET.yaml."""

import sys

from visattn.train.start import begin

if __name__ == "__main__":
    begin()

from visattn.train.__main__ import fail, finish, main
from visattn.train.errors import ConfigError, shown
from visattn.train.files import configs_folder


def run(argv: list[str]) -> int:
    """Run the trainer with the preset that the first argument names; returns the exit code."""
    try:
        presets = {path.stem: str(path) for path in sorted((configs_folder() / "finetune").glob("*.yaml"))}
        if not argv or argv[0] not in presets:
            got = shown(argv[0]) if argv else "none"
            names = ", ".join(presets)
            raise ConfigError(f"expected a preset, got {got}; try python -m visattn.train.finetune with {names}")
    except ConfigError as error:
        return fail(error, rank=0)
    return main(["--config", presets[argv[0]], *argv[1:]])


if __name__ == "__main__":
    finish(run(sys.argv[1:]))
