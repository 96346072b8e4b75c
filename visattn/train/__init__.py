"""The trainer: `python -m visattn.train`, with the extra "train". Nothing else in visattn imports it."""
