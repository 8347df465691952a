"""Checkpoints that do not depend on the number of ranks or on how parameters are distributed over them."""

from lightning_lss.checkpoint.convert import consolidate

__all__ = ["consolidate"]
