"""LightningDataModules: whole sequences for the ranks of a sequence group, which the strategy then cuts into
segments."""

from lightning_lss.data.enwik8 import Enwik8DataModule
from lightning_lss.data.recall import RecallDataModule
from lightning_lss.data.stdlib import StdlibDataModule
from lightning_lss.data.text import TextDataModule

__all__ = ["Enwik8DataModule", "RecallDataModule", "StdlibDataModule", "TextDataModule"]
