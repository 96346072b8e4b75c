"""`visattn finetune PRESET --model NAME --data DIR`: the trainer with configs/finetune/PRESET.yaml."""

import sys

from visattn.train.start import begin

if __name__ == "__main__":
    begin()

from visattn.train import __main__ as trainer
from visattn.train.errors import ConfigError, shown
from visattn.train.files import configs_folder


def main(argv: list[str] | None = None) -> int:
    """Run the trainer with the preset that the first argument names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        presets = {path.stem: path for path in sorted((configs_folder() / "finetune").glob("*.yaml"))}
        if argv and argv[0] in ("-h", "--help"):
            print("usage: visattn finetune PRESET --model NAME --data DIR ...\n")
            for name, path in presets.items():
                said = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines())
                print(f"  {name:20}{said.partition('. ')[0].partition(': ')[0]}")
            print("\n$ visattn finetune full --data DIR --model dinat_mini --val-split 0.2 --batch-size 32")
            print(
                "$ visattn finetune linear_probe --data DIR --model dinat_atto --weights output/RUN/model.safetensors"
            )
            print("\nvisattn finetune PRESET --help shows all options, with the preset's values.")
            return 0
        if not argv or argv[0] not in presets:
            got = shown(argv[0]) if argv else "none"
            raise ConfigError(f"expected a preset, got {got}; try visattn finetune with {', '.join(presets)}")
    except ConfigError as error:
        return trainer.fail(error, rank=0)
    return trainer.main(["--config", str(presets[argv[0]]), *argv[1:]])


if __name__ == "__main__":
    trainer.finish(main())
