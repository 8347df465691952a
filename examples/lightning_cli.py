"""Run LightningCLI with this package's model and data: python examples/lightning_cli.py fit --help"""

from lightning.pytorch.cli import LightningCLI

from lightning_lss import LSSTransformer
from lightning_lss.data import StdlibDataModule

if __name__ == "__main__":
    LightningCLI(LSSTransformer, StdlibDataModule)
