"""Test a segmentor: `python tools/test_seg.py CONFIG CHECKPOINT`, or the same under torchrun."""

from mm_runner import main

if __name__ == "__main__":
    main("mmseg", "test", __doc__)
