"""LightningDataModules. They load whole sequences; the strategy then cuts these into segments."""

from lightning_lss.data.enwik8 import Enwik8DataModule
from lightning_lss.data.recall import RecallDataModule
from lightning_lss.data.stdlib import StdlibDataModule
from lightning_lss.data.text import TextDataModule

__all__ = ["Enwik8DataModule", "RecallDataModule", "StdlibDataModule", "TextDataModule"]
