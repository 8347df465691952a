"""The command line: `lightning-lss`, `python -m lightning_lss` and, in a clone, `python train.py`."""
