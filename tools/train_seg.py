"""Train a segmentor: `python tools/train_seg.py CONFIG`, or `torchrun --nproc-per-node N tools/train_seg.py CONFIG`."""

from mm_runner import main

if __name__ == "__main__":
    main("mmseg", "train", __doc__)
