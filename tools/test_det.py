"""Test a detector: `python tools/test_det.py CONFIG CHECKPOINT`, or the same under torchrun."""

from mm_runner import main

if __name__ == "__main__":
    main("mmdet", "test", __doc__)
