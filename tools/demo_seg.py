"""Train a small segmentor on real pictures for some minutes on a CPU, and draw its masks beside the truth.

    python tools/demo_seg.py                           # Semantic FPN: nuclei under the microscope
    python tools/demo_seg.py --model test_transnext    # another backbone

The validation set goes to output/demo_seg/nuclei.png, with the checkpoint and the log. The first run downloads the
pictures: see tools/make_small_sets.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from demo_mm import Panel, channels, draw, load, options, predictions, train

WIDTH = 64  # of neck and head; 256 and 128 in the published segmentors


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare and draw."""
    args = options(__doc__, "demo_seg", {"nuclei": 150}, arguments)
    config = load(args, *(f"segmentation/_base_/{name}.py" for name in ("semantic_fpn", args.set, "runtime")))
    config.model.data_preprocessor.size = (256, 256)
    config.model.neck.update(in_channels=channels(config), out_channels=WIDTH)
    config.model.decode_head.update(in_channels=[WIDTH] * 4, channels=WIDTH, num_classes=2)
    runner = train(config, args, ("mIoU", "mAcc"))
    columns = []
    for image, sample in predictions(runner, 4):
        truth, found = (part.data[0].cpu().numpy() for part in (sample.gt_sem_seg, sample.pred_sem_seg))
        wrong = 100 * float((truth != found).mean())
        columns.append(
            [
                Panel("image", image),
                Panel("truth", image, masks=[truth]),
                Panel(f"found: {wrong:.1f} % of pixels differ", image, masks=[found], colour="deepskyblue"),
            ]
        )
    draw(columns, args.out / f"{args.set}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
