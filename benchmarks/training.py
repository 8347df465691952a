"""Train one contestant: the real Trainer on the same model and the same tokens for everyone."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.clock import StepClock
from benchmarks.contestants import CONTESTANTS, Contestant, attention_module
from lightning_lss import LSSAttention, LSSStrategy, LSSTransformer
from lightning_lss.megatron import MegatronTransformer
from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.testing.compare import worst_difference

_CONF = Path(__file__).parents[1] / "conf" / "model"
_SIZES = (
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "positions",
    "mlp",
    "mlp_width",
    "dropout",
    "tie_embeddings",
)


@dataclass(frozen=True)
class Job:
    """A model and the length of its training.

    Args:
        model: arguments of :class:`~lightning_lss.LSSTransformer`, ``seq_len`` included.
        steps: training steps of a run, those of the warm-up included.
        warm_up: number of steps at the start that are not counted.
    """

    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    warm_up: int = 1

    @property
    def length(self) -> int:
        """Global sequence length L."""
        return self.model["seq_len"]

    @property
    def config(self) -> TransformerConfig:
        """The sizes of the model."""
        names = {field.name for field in fields(TransformerConfig)}
        return TransformerConfig(**{name: value for name, value in self.model.items() if name in names})

    def with_model(self, **options: Any) -> "Job":
        """Return the same job with other arguments of the model."""
        return replace(self, model={**self.model, **options})


def model_options(name: str, **options: Any) -> dict[str, Any]:
    """Read the arguments of a model on bytes from ``conf/model/NAME.yaml``; ``options`` other than None replace them."""
    config = OmegaConf.merge(OmegaConf.load(_CONF / "default.yaml"), OmegaConf.load(_CONF / f"{name}.yaml"))
    sizes = {key: config[key] for key in _SIZES}
    return {"vocab_size": 256, **sizes, **{key: value for key, value in options.items() if value is not None}}


def make_module(contestant: Contestant, job: Job) -> LSSTransformer:
    """Build the model from the same seed for everyone, with the contestant's attention in it."""
    torch.manual_seed(7)
    cls = MegatronTransformer if contestant.strategy == "megatron" else LSSTransformer
    module = cls(**{**job.model, **contestant.model})
    place_attention(module, contestant)
    return module


def place_attention(root: nn.Module, contestant: Contestant) -> None:
    """Replace every :class:`~lightning_lss.LSSAttention` below ``root`` by the contestant's attention, if any."""
    if contestant.attention is None:
        return
    parents: list[Any] = [
        parent for parent in root.modules() if isinstance(getattr(parent, "attention", None), LSSAttention)
    ]
    for parent in parents:
        parent.attention = attention_module(contestant, parent.attention.causal)


def make_trainer(contestant: Contestant, size: int, job: Job, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Build a Trainer for ``size`` ranks that share every sequence; it writes no files and prints nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=make_strategy(contestant, size),
        callbacks=callbacks,
        max_steps=job.steps,
        gradient_clip_val=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def make_strategy(contestant: Contestant, size: int) -> Any:
    """Build the strategy of a rank."""
    launched: dict[str, Any] = {"cluster_environment": LightningEnvironment()}  # the processes exist already
    if contestant.strategy == "single":
        return "auto"
    if contestant.strategy == "ddp":
        return DDPStrategy(**launched)
    if contestant.strategy == "megatron":
        from lightning_lss.megatron import MegatronStrategy

        return MegatronStrategy(size)
    return LSSStrategy(size, contestant.layout, verify=False, **launched, **contestant.options)


def make_loader(job: Job) -> DataLoader[Any]:
    """Yield the same sequence of random bytes at every step."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(job.model["vocab_size"], (job.length + 1,), generator=generator)
    return DataLoader([{"inputs": tokens[:-1], "targets": tokens[1:]}] * job.steps, batch_size=1)


def fit(name: str, size: int, job: Job, *callbacks: pl.Callback) -> pl.Trainer:
    """Train ``job`` on this rank."""
    contestant = CONTESTANTS[name]
    trainer = make_trainer(contestant, size, job, list(callbacks))
    trainer.fit(make_module(contestant, job), make_loader(job))
    return trainer


def time_steps(rank: int, name: str, size: int, job: Job) -> list[float]:
    """Measure the seconds between the ends of consecutive steps, with data loading, without the warm-up."""
    clock = StepClock()
    fit(name, size, job, clock)
    return clock.seconds_between_ends[job.warm_up - 1 :]


class _Turns(pl.Callback):
    """Take turns with other runs, step by step, and note the seconds of its own steps.

    A byte in a pipe is the permission to go on: a run takes it out of ``before``, trains one step (from
    the end of the last one, data loading included) and puts it into ``after``.
    """

    def __init__(self, before: Path, after: Path, first: bool) -> None:
        self._before, self._after = (os.open(pipe, os.O_RDWR) for pipe in (before, after))
        self._first = first
        self._start = 0.0
        self.seconds: list[float] = []

    def on_train_start(self, *args: Any) -> None:
        if not self._first:
            os.read(self._before, 1)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        os.write(self._after, b"x")
        if trainer.global_step < trainer.max_steps:
            os.read(self._before, 1)
        self._start = time.perf_counter()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        os.close(self._before)
        os.close(self._after)


def time_steps_in_turn(rank: int, names: Sequence[str], job: Job, folder: Path) -> list[float]:
    """Measure the seconds of the steps of contestant ``names[rank]``, without the warm-up. It trains as the only rank
    of its own run while the others wait. ``folder`` has a named pipe for each of them."""
    pipes = [folder / str(index) for index in range(len(names))]
    turns = _Turns(pipes[rank], pipes[(rank + 1) % len(names)], first=rank == 0)
    fit(names[rank], 1, job, turns)
    if dist.is_initialized():
        dist.destroy_process_group()
    return turns.seconds[job.warm_up :]


class _Gradients(pl.Callback):
    """Keep the whole gradients of the first step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.by_name[name] = whole(parameter.grad).clone()


def whole(x: Tensor) -> Tensor:
    """Return the whole of a tensor that may be distributed."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(rank: int, name: str, size: int, job: Job) -> dict[str, Tensor]:
    """Return the gradients of the first step by parameter, on rank 0 only, since all ranks have the same."""
    taken = _Gradients()
    fit(name, size, replace(job, steps=1, warm_up=0), taken)
    return taken.by_name if rank == 0 else {}


def gradient_error(own: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient; infinite if one is missing or not finite."""
    return worst_difference(own, expected).error


def checking_job(job: Job, size: int) -> Job:
    """Return a small job of the same kind to compare gradients on: short, shallow, without dropout.

    Positions are rotary, so that every parameter exists whole on every rank.
    """
    return job.with_model(seq_len=32 * size, num_layers=2, dropout=0.0, positions="rotary")
