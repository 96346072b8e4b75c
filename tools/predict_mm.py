"""Draw what a detector or segmentor finds: `python tools/predict_mm.py CONFIG CHECKPOINT IMAGE... --out FOLDER`.

Images are files, folders or patterns. The folder receives vis/ (pictures), and of a detector preds/ (boxes, scores and
masks as JSON), of a segmentor pred/ (class numbers as PNG), below folders named as those of the images.
"""

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from mm_runner import read_config, stop
from mmdet.apis import DetInferencer
from mmseg.apis import MMSegInferencer
from mmseg.registry import DATASETS

from visattn.mm import fit_channels
from visattn.mm.checkpoints import load_from_file
from visattn.train.errors import DataNotFoundError
from visattn.train.predict import find_files
from visattn.train.sources import BadImageError, FolderSource
from visattn.weights import WeightsError, check_fit


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="file of configs/, or the one in a run's folder")
    parser.add_argument("checkpoint", help="weights of the whole detector or segmentor")
    parser.add_argument("images", nargs="+", help="files, folders, patterns")
    parser.add_argument("--out", type=Path, default=Path("output/predictions"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="least score of a box that is drawn (default: 0.3)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    args = parser.parse_args()

    config = read_config(args.config, {})
    scope = config.get("default_scope")
    if scope not in ("mmdet", "mmseg"):
        stop(f"expected a config of mmdet or mmseg, got one of {scope}; try one of configs/")
    try:
        fit_channels(config.model)
        files = _readable(find_files(tuple(args.images)))
        saved = load_from_file(args.checkpoint, "cpu")
        predict = _inferencer(config, args, scope, saved.get("meta", {}).get("dataset_meta"))
        # mmengine leaves a head of other classes as it was initialized, and draws what that says.
        check_fit(predict.model, saved.get("state_dict", saved), f"weights of {args.config}", args.checkpoint)
    except (DataNotFoundError, WeightsError) as error:
        stop(str(error))
    options = {"pred_score_thr": args.threshold, "no_save_pred": False} if scope == "mmdet" else {}
    top = os.path.commonpath(map(os.path.dirname, map(os.path.abspath, files)))
    folders = defaultdict(list)  # pictures of one name in two folders would be written over
    for file in files:
        folders[os.path.relpath(os.path.dirname(os.path.abspath(file)), top)].append(file)
    for folder, members in folders.items():
        predict(members, batch_size=args.batch_size, out_dir=str(args.out / folder), **options)
    print(f"{len(files)} pictures below {args.out}")
    return 0


def _readable(files: list[str]) -> list[str]:
    """The images that can be decoded; others are named."""
    source, good = FolderSource(files, [0] * len(files), "RGB"), []
    for index, file in enumerate(files):
        try:
            source.read(index)
            good.append(file)
        except BadImageError as error:
            print(f"unreadable: {file} ({error})")
    if not good:
        stop(f"expected images that can be read, got none of {len(files)}; try others")
    return good


def _inferencer(config: Any, args: argparse.Namespace, scope: str, meta: dict[str, Any] | None) -> Any:
    """Build mmdet's or mmseg's, with the classes and colours of the checkpoint or, without, of the config's data."""
    if scope == "mmdet":
        return DetInferencer(config, args.checkpoint, device=args.device)
    data = config.test_dataloader.dataset
    meta = meta or data.get("metainfo") or DATASETS.get(data.type).METAINFO
    classes = list(meta["classes"])
    colours = meta.get("palette") or np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
    colours = [list(colour) for colour in colours]
    inferencer = MMSegInferencer(config, args.checkpoint, classes, colours, device=args.device)
    inferencer.model.dataset_meta = {"classes": classes, "palette": colours}  # it would take a checkpoint's half
    return inferencer


if __name__ == "__main__":
    raise SystemExit(main())
