"""Runs of the real Trainer inside the ranks of a :class:`lightning_lss.testing.world.World`."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lss import LSSStrategy, LSSTransformer
from lightning_lss.checkpoint.file import FileCheckpoints
from lightning_lss.checkpoint.state import Owners
from lightning_lss.megatron import MegatronStrategy, MegatronTransformer
from lightning_lss.nn.loss import IGNORED

QUIET: dict[str, Any] = dict(
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)
VOCAB, LENGTH = 11, 16
TABLE = "model.positions.weight"  # the name of the positional table


def make_samples(count: int, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Random tokens, of whose targets each sample leaves out a part of its own, so that segments hold different
    numbers."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        tokens = torch.randint(VOCAB, (length + 1,), generator=generator)
        targets = tokens[1:].clone()
        targets[: index % (length // 2)] = IGNORED
        samples.append({"inputs": tokens[:-1], "targets": targets})
    return samples


class SGDTransformer(LSSTransformer):
    """SGD, since Adam would hide a gradient that is wrong by a factor."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class AdamTransformer(SGDTransformer):
    """Adam has two moments for each parameter; a large eps keeps tiny gradients from being blown up to a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, eps=1e-2)


@dataclass
class Run:
    """What a run is made of; everything in it can be sent to a worker."""

    size: int = 1  # S
    layout: str = "zigzag"
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    global_batch: int = 4
    module: type[pl.LightningModule] = SGDTransformer
    samples: int = 64
    resume: str | None = None
    save: str | None = None


def epochs(count: int, size: int = 1, **more: Any) -> Run:
    """Epochs of five steps each; Lightning resumes at the start of an epoch."""
    return Run(size=size, trainer={"max_epochs": count}, steps=-1, samples=20, **more)


KINDS = ["fsdp", "hybrid"]


def sharded(kind: str | None = "fsdp", **more: Any) -> dict[str, Any]:
    return {"sharding": kind, **more}


def as_rank(rank: int) -> None:
    """Let Lightning believe that a launcher started this process as ``rank``."""
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["NODE_RANK"] = "0"


def make_trainer(rank: int, run: Run, **more: Any) -> pl.Trainer:
    as_rank(rank)
    world_size = dist.get_world_size()
    options = {"cluster_environment": LightningEnvironment(), **run.strategy}
    strategy: Any = "auto"
    if options.pop("ddp", False):
        strategy = DDPStrategy(**options)
    elif options.pop("megatron", False):
        del options["cluster_environment"]  # the Trainer's own choice is the same
        strategy = MegatronStrategy(run.size, **options)
    elif world_size > 1 or run.strategy:
        strategy = LSSStrategy(run.size, run.layout, **options)
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        **{**QUIET, "use_distributed_sampler": False, "max_steps": run.steps, **run.trainer, **more},
    )


def as_it_is_trainer(rank: int, size: int, layout: str = "auto", **options: Any) -> pl.Trainer:
    """The Trainer of one epoch for a module that knows nothing of ranks; ``options`` are those of the strategy."""
    as_rank(rank)
    strategy = LSSStrategy(size, layout, cluster_environment=LightningEnvironment(), **options)  # type: ignore[arg-type]
    more: dict[str, Any] = {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "max_epochs": 1, **QUIET}
    return pl.Trainer(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **more)


def make_module(run: Run) -> pl.LightningModule:
    torch.manual_seed(7)
    options = dict(vocab_size=VOCAB, seq_len=LENGTH, width=16, num_layers=2, num_heads=4, num_kv_heads=2)
    cls = run.module
    if run.strategy.get("megatron"):
        cls = type(cls.__name__, (MegatronTransformer, cls), {})
    return cls(**{**options, **run.model})


def make_loader(trainer: pl.Trainer, samples: list[Any], batch_size: int) -> DataLoader:
    """Samples in order, so that one process and many see the same batches (Lightning's own sampler shuffles when
    training)."""
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
    return DataLoader(samples, batch_size, sampler=DistributedSampler(samples, shuffle=False, **kwargs))


def fit(rank: int, run: Run) -> dict[str, Tensor]:
    """Train; return the weights as a checkpoint would hold them."""
    warnings.filterwarnings("ignore", module="lightning")
    module, trainer = make_module(run), make_trainer(rank, run)
    per_rank = run.global_batch * run.size // dist.get_world_size()
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), per_rank), ckpt_path=run.resume)
    if run.save is not None:
        trainer.save_checkpoint(run.save)
    return whole_state(module)


def whole_state(module: pl.LightningModule) -> dict[str, Tensor]:
    """The weights as a checkpoint would hold them, from what every rank has: copies that differ are not hidden."""
    state = FileCheckpoints(lambda tensor: tensor).collect(module.state_dict(), Owners(module))
    return {name: value.detach().clone() for name, value in state.items()}


def moments(file: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizers' state by optimizer, parameter and moment."""
    states = enumerate(file["optimizer_states"])
    return {f"{o}.{i}.{key}": x for o, s in states for i, own in s["state"].items() for key, x in own.items()}
