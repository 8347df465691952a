"""Checkpoints that know neither the number of ranks nor how parameters lie on them."""

from lightning_lss.checkpoint.convert import consolidate

__all__ = ["consolidate"]
