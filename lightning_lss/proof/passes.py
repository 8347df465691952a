"""Run the user's own training step on one batch, whole on every rank alone or split, and take its gradients."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _update_default_pg

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import FullyShard
from lightning_lss.parallel.replicated import Replicated
from lightning_lss.proof.counts import Means, PlainMeans
from lightning_lss.proof.operations import Record
from lightning_lss.proof.untouched import evaluate, untouched
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules


class BackwardDone(BaseException):
    """Leaves a step with manual optimization after its first backward; not an ``Exception``, so that no user code
    catches it."""


@dataclass
class Rehearsal:
    """What it takes to run a training step of ``module`` apart from the training."""

    module: pl.LightningModule
    call: Callable[..., Any]
    """Runs ``training_step`` as the strategy does, but for DistributedDataParallel."""
    parameters: Replicated | FullyShard
    shard: SequenceShard
    precision: Precision
    device: torch.device
    alone: Callable[[], AbstractContextManager[Any]]
    """Makes the strategy say that there is one rank."""
    split_batch: Callable[[Any], Any]
    """Cuts a batch to this rank's segment."""
    more: tuple[Any, ...] = ()
    """Arguments of ``training_step`` after the batch."""
    in_step: bool = False
    """Whether a step runs now, whose manual backward ends it."""

    def run(
        self,
        batch: Any,
        whole: bool,
        share: float = 1.0,
        watch: Record | None = None,
    ) -> "Pass":
        """Run the step on ``batch``, whole or split, and take its loss and gradients.

        ``share`` says what part of its positions a positional table lends to the batch. With ``watch`` there is no
        backward: the step runs within it.
        """
        module = self.module
        self.parameters.reshard()
        with ExitStack() as stack:
            stack.enter_context(untouched(module, self.parameters.parameters(module), self.device))
            evaluate(module)
            leaves = stack.enter_context(self.parameters.rehearse(module))
            tables = stack.enter_context(_tables(module, whole, share))
            if whole:
                stack.enter_context(_alone(module, self.alone()))
            part = batch if whole else self.split_batch(batch)
            if watch is not None:
                watch.start(module, part)
            loss = self._loss(part, watch)
            return Pass(loss, _gradients({**leaves, **tables}) if watch is None else {}, self._means)

    def _loss(self, batch: Any, watch: Record | None) -> Tensor:
        self.in_step, self._losses = True, list[Tensor]()
        self._backward = watch is None
        try:
            means = PlainMeans()
            self._means = means.calls
            with torch.enable_grad(), self.precision.train_step_context(), watch or means:
                output = self.call(batch, *self.more)
        except BackwardDone:
            return self._losses[0]
        finally:
            self.in_step = False
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not self.module.automatic_optimization:
            raise NoLossError("training_step returned no loss")
        if self._backward:
            (loss * self._scale).backward()
        return loss.detach()

    def end_manual_step(self, loss: Tensor) -> None:
        """Take the place of the first ``manual_backward`` of a step."""
        self._losses.append(loss.detach())
        if self._backward:
            self.parameters.before_backward(loss)
            (loss * self._scale).backward()
        raise BackwardDone

    @property
    def _scale(self) -> float:
        """What the loss is multiplied with, since gradients in float16 would be rounded to 0."""
        scaler = getattr(self.precision, "scaler", None)
        return 1024.0 if scaler is not None else 1.0


class NoLossError(Exception):
    """There is nothing to compare."""


@dataclass
class Pass:
    """What a step gave."""

    loss: Tensor
    gradients: dict[str, Tensor]
    """By the name of the parameter, before they are averaged over the ranks."""
    means: Means
    """Losses that are plain means, see :mod:`lightning_lss.proof.counts`."""


def _gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@contextmanager
def _alone(module: nn.Module, strategy_alone: AbstractContextManager[Any]) -> Generator[None, None, None]:
    """Make this rank a world of its own: whoever asks how many ranks there are, or communicates, finds one."""
    world = dist.group.WORLD
    assert world is not None
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    segmented = [(x, x.shard) for x in segment_modules(module) if not x.segment_local]
    with ExitStack() as stack:
        stack.enter_context(strategy_alone)
        stack.callback(dist.destroy_process_group, own)
        stack.callback(_update_default_pg, world)
        _update_default_pg(own)
        for part, shard in segmented:
            stack.callback(part.set_shard, shard)
            part.set_shard(WHOLE_SEQUENCE)
        yield


@contextmanager
def _tables(module: nn.Module, whole: bool, share: float) -> Generator[dict[str, Tensor], None, None]:
    """Let every positional table stand for ``share`` of its positions, with rows of its own, and yield the rows by name.

    Split, a rank has the first of its rows; whole, all ranks have those of all.
    """
    lent: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for prefix, table in module.named_modules():
            if isinstance(table, SegmentPositionalEmbedding) and table.shard.size > 1:
                weight, count = table.weight, table.num_positions
                rows = weight.detach()[: round(weight.size(0) * share)]
                rows = table.shard.gather(rows, dim=0) if whole else rows
                stack.callback(_set_table, table, weight, count, table.shard)
                stand_in = nn.Parameter(rows, requires_grad=weight.requires_grad)
                _set_table(table, stand_in, round(count * share), WHOLE_SEQUENCE if whole else table.shard)
                lent[f"{prefix}.weight"] = stand_in
        yield lent


def _set_table(table: SegmentPositionalEmbedding, weight: nn.Parameter, count: int, shard: SequenceShard) -> None:
    table.weight, table.num_positions, table.shard = weight, count, shard
