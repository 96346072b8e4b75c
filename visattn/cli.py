"""`visattn COMMAND ...`; so far: export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.utils import ParseKwargs

import visattn  # noqa: F401  registers the models
from visattn.export import TARGETS, export
from visattn.export.program import DYNAMIC


def _export(args: argparse.Namespace) -> None:
    if not args.pretrained and args.checkpoint is None:
        print("note: random weights, as neither --pretrained nor --checkpoint is given", file=sys.stderr)
    classes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model = timm.create_model(
        args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, **classes, **args.model_kwargs
    )
    side = args.image_size and (args.image_size if len(args.image_size) > 1 else args.image_size[0])
    report = export(
        model,
        args.file,
        args.target,
        dynamic=args.dynamic,
        image_size=side,
        batch_size=args.batch_size,
        labels=None if args.labels is None else _read_labels(args.labels),
        opset=args.opset,
        tolerance=args.tolerance,
    )
    print(report)


def _read_labels(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # Windows begins files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected labels in a text file of UTF-8, got {path} ({error}); try another file") from error
    return [line.strip() for line in lines if line.strip()]


class _Arguments(ParseKwargs):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"expected KEY=VALUE after {option_string}, got {wrong[0]!r}; try drop_path_rate=0.1")
        super().__call__(parser, namespace, values, option_string)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("visattn", description="Attention vision backbones for timm.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("export", help="write a model as another runtime reads it, verified against PyTorch")
    one.set_defaults(run=_export)
    suffixes = ", ".join(f"{target.suffix} ({name})" for name, target in TARGETS.items())
    one.add_argument("model", help="a name for timm.create_model, such as dinat_mini")
    one.add_argument("file", type=Path, help=f"what to write: {suffixes}")
    one.add_argument("--target", help="if the suffix does not say it")
    one.add_argument("--dynamic", default="batch", help=f"sizes that may change: {', '.join(DYNAMIC)} (all three)")
    one.add_argument("--image-size", type=int, nargs="+", help="height and width in pixels, or one side")
    one.add_argument("--batch-size", type=int, default=1, help="images at a time, with --dynamic none")
    one.add_argument("--pretrained", action="store_true", help="fetch the model's weights")
    one.add_argument("--checkpoint", help="file of weights: .safetensors, or a .pth of tensors")
    one.add_argument("--num-classes", type=int)
    one.add_argument("--model-kwargs", nargs="*", default={}, action=_Arguments, metavar="KEY=VALUE")
    one.add_argument("--labels", type=Path, help="file with the name of a class on each line, kept in what is written")
    one.add_argument("--opset", type=int, help="version of ONNX's operators")
    one.add_argument("--tolerance", type=float, default=1e-5, help="largest accepted error relative to PyTorch")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what a user can mend ends it with one sentence and exit status 1."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError, SafetensorError) as error:
        sys.exit(f"visattn: {error}")
