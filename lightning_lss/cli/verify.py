"""`mode=verify`: prove on CPU processes that the training is that of one device; nothing is trained."""

from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from lightning_lss.cli.run import make_data, make_model
from lightning_lss.sequence.layout import resolve_sequence_parallel_size
from lightning_lss.verifier import verify

_MOST = 8  # processes on this machine; more would only take longer
_OF_RUN = {"_target_", "sequence_parallel_size", "verify"}


def run_verify(cfg: DictConfig) -> None:
    """Prove the training that ``cfg`` describes on the first batch of its data; raise ``InexactError`` if it is not that of one
    device."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = make_data(cfg)
    datamodule.prepare_data()
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    model = make_model(cfg, lambda name: getattr(datamodule, name))
    size = resolve_sequence_parallel_size(cfg.devices * cfg.trainer.num_nodes, cfg.strategy.sequence_parallel_size)
    given: Any = OmegaConf.to_container(cfg.strategy, resolve=True)
    options = {name: value for name, value in given.items() if name not in _OF_RUN}
    verify(model, batch, min(size, _MOST), precision=cfg.trainer.precision, **options)
