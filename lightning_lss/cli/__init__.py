"""The command line: `lightning-lss`, `python -m lightning_lss.cli` and, in a clone, `python train.py`."""
