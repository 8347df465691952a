"""A training script as a user would start it: python launch_script.py STRATEGY CHECKPOINT."""

import sys
import warnings

import lightning.pytorch as pl

import lightning_lss  # noqa: F401 (registers the strategies)
from tests.training import Run, make_loader, make_module, make_samples


def main(strategy: str, checkpoint: str) -> None:
    warnings.filterwarnings("ignore")
    devices = 1 if strategy == "auto" else 2
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=3,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = make_module(Run())
    trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    if "spawn" in strategy or "fork" in strategy:  # the weights have come back to the process that asked for them
        assert module.state_dict()["model.positions.weight"].shape[0] == 16
    trainer.save_checkpoint(checkpoint)


if __name__ == "__main__":
    main(*sys.argv[1:])
