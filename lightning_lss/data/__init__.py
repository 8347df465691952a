"""LightningDataModules. They load whole sequences; the strategy then cuts these into segments."""

from lightning_lss.data.dataset import DatasetDataModule
from lightning_lss.data.enwik8 import Enwik8DataModule
from lightning_lss.data.fasta import FastaDataModule
from lightning_lss.data.recall import RecallDataModule
from lightning_lss.data.stdlib import StdlibDataModule
from lightning_lss.data.text import TextDataModule
from lightning_lss.data.tokens import TokensDataModule

__all__ = [
    "DatasetDataModule",
    "Enwik8DataModule",
    "FastaDataModule",
    "RecallDataModule",
    "StdlibDataModule",
    "TextDataModule",
    "TokensDataModule",
]
