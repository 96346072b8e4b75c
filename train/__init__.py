"""The trainer: `python -m train`. It imports visattn, is never imported by it, and is not installed."""
