"""Train a detector: `python tools/train_det.py CONFIG`, or `torchrun --nproc-per-node N tools/train_det.py CONFIG`."""

from mm_runner import main

if __name__ == "__main__":
    main("mmdet", "train", __doc__)
