"""Train a small detector on real pictures for some minutes on a CPU, and draw what it finds beside the truth.

    python tools/demo_det.py                           # Mask R-CNN: nuclei under the microscope
    python tools/demo_det.py --set trees               # Faster R-CNN: tree crowns from the air
    python tools/demo_det.py --model test_transnext    # another backbone

Boxes and masks of the validation set go to output/demo_det/SET.png, with the checkpoint and the log. The first run
downloads the pictures: see tools/make_small_sets.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from demo_mm import Panel, channels, draw, load, options, predictions, train

WIDTH = 64  # of neck and heads, 256 in the published detectors
SCORE = 0.5  # what is drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare and draw."""
    args = options(__doc__, "demo_det", {"nuclei": 250, "trees": 400}, arguments)
    masks = args.set == "nuclei"
    bases = ("mask_rcnn", args.set, "runtime")
    config = load(args, *(f"detection/_base_/{name}.py" for name in bases))
    config.model.neck.update(in_channels=channels(config), out_channels=WIDTH)
    config.model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
    heads = config.model.roi_head
    heads.bbox_roi_extractor.out_channels = WIDTH
    heads.bbox_head.update(in_channels=WIDTH, fc_out_channels=4 * WIDTH, num_classes=1)
    if masks:
        heads.mask_roi_extractor.out_channels = WIDTH
        heads.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH, num_classes=1)
    else:
        config.model.type = "FasterRCNN"
        del heads["mask_roi_extractor"], heads["mask_head"]
    few = {"nms_pre": 500, "max_per_img": 200}  # small pictures
    config.model.train_cfg.rpn_proposal.update(few)
    config.model.test_cfg.rpn.update(few)
    config.model.train_cfg.rcnn.sampler.num = 128
    kinds = ("bbox", "segm") if masks else ("bbox",)
    runner = train(config, args, [f"coco/{kind}_{name}" for kind in kinds for name in ("mAP", "mAP_50")])
    columns = []
    for image, sample in predictions(runner, 4):
        truth, found = sample.gt_instances, sample.pred_instances
        found = found[found.scores >= SCORE]
        shapes = [list(truth.masks.masks), list(found.masks.cpu().numpy())] if masks else [(), ()]
        boxes = [truth.bboxes.tensor if hasattr(truth.bboxes, "tensor") else truth.bboxes, found.bboxes]
        titles = [f"truth: {len(truth)}", f"found with a score of {SCORE} or more: {len(found)}"]
        colours = ("gold", "deepskyblue")
        columns.append(
            [
                Panel(title, image, list(box.cpu().numpy()), shape, colour)
                for title, box, shape, colour in zip(titles, boxes, shapes, colours, strict=True)
            ]
        )
    draw(columns, args.out / f"{args.set}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
