"""Run the user's own training step on one batch, whole on every rank alone or split, and take its gradients."""

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _update_default_pg
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.parallel.fsdp import FullyShard
from lightning_lss.parallel.replicated import Replicated
from lightning_lss.proof.operations import Record
from lightning_lss.proof.untouched import evaluate, untouched
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules


@dataclass
class Pass:
    """What a step gave."""

    loss: Tensor
    """A scalar; of manual optimization, the sum of all losses."""
    gradients: dict[str, Tensor]
    """By the name of the parameter, before they are averaged over the ranks."""
    dtypes: set[torch.dtype]
    """Of the results of its operators."""


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
    pretend: Callable[[SequenceShard], AbstractContextManager[Any]]
    """Makes the strategy say that the ranks of a shard are all there are."""
    split_batch: Callable[[Any], Any]
    """Cuts a batch to this rank's segment."""
    more: tuple[Any, ...] = ()
    """Arguments of ``training_step`` after the batch."""
    before: SequenceShard | None = None
    """Another layout, under which a step goes before each split one, so that what the module keeps of it shows: positions by
    their number, say. One goes before each whole one as well, so that counters and random numbers are the same."""
    shows_whole: bool = False
    """Whether the module is shown whole sequences where they are split."""
    is_running: bool = False
    """Whether a step runs now, whose manual backward passes come here."""
    _losses: list[Tensor] = field(default_factory=list)
    _takes_gradients: bool = True

    def run(self, batch: Any, whole: bool, share: float = 1.0, watch: Record | None = None) -> Pass:
        """Run the step on ``batch``, whole or split, and take its loss and gradients.

        ``share`` says what part of its positions a positional table lends to the batch. With ``watch`` there is no
        backward: the step runs within it.
        """
        module, shard = self.module, WHOLE_SEQUENCE if whole else self.shard
        self.parameters.reshard()
        with ExitStack() as stack:
            written = stack.enter_context(untouched(module, self.parameters.parameters(module), self.device))
            evaluate(module)
            leaves = stack.enter_context(self.parameters.rehearse(module))
            tables = stack.enter_context(_tables(module, shard, share))
            self._losses, self._takes_gradients = [], False
            if self.before is not None:
                self._step_before(batch, shard if whole else self.before)
            self._losses, self._takes_gradients = [], watch is None
            stack.enter_context(_world_of(module, shard, self.pretend(shard)))
            part = batch if whole else self.split_batch(batch)
            if watch is not None:
                watch.start(module, part)
            self._step(part, watch or nullcontext())
            loss = torch.stack(self._losses).sum() if self._losses else torch.zeros((), device=self.device)
            return Pass(loss, _gradients({**leaves, **tables}), written.dtypes)

    def _step_before(self, batch: Any, shard: SequenceShard) -> None:
        current = True
        if shard is self.before:
            shard = replace(shard, is_current=lambda _: current)
        with ExitStack() as stack:
            stack.enter_context(_world_of(self.module, shard, self.pretend(shard)))
            if shard.size > 1:
                for part in segment_modules(self.module):
                    stack.callback(part.set_shard, part.shard)
                    part.set_shard(shard)
            self._step(batch if shard.size == 1 else self.split_batch(batch), nullcontext())
        current = False
        self.parameters.reshard()

    def _step(self, batch: Any, watch: AbstractContextManager[Any]) -> None:
        self.is_running = True
        try:
            with _silence(), torch.enable_grad(), _without_optimizers(), self.precision.train_step_context(), watch:
                output = self.call(batch, *self.more)
        except _OptimizerStep:
            return
        finally:
            self.is_running = False
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and self.module.automatic_optimization:
            self.backward(loss)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """Take the place of a backward pass of the step; further arguments are those of ``Tensor.backward``."""
        self._losses.append(loss.detach().sum())
        if self._takes_gradients:
            self.parameters.before_backward(loss)
            (loss * self._scale).backward(*args, **options)

    @property
    def _scale(self) -> float:
        """What the loss is multiplied with, since gradients in float16 would be rounded to 0."""
        return 1.0 if getattr(self.precision, "scaler", None) is None else 1024.0


@contextmanager
def _silence() -> Generator[None, None, None]:
    """Leave warnings to the training step, which has the whole batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _OptimizerStep(BaseException):
    """Ends a step before its own optimizer, which is not one of Lightning's, changes parameters; not an ``Exception``, so that
    no user code catches it."""


@contextmanager
def _without_optimizers() -> Generator[None, None, None]:
    """Let steps with manual optimization go on without those of their optimizers, so that all of their losses are compared."""

    def stop(*_: Any) -> None:
        raise _OptimizerStep

    def go_on(optimizer: LightningOptimizer, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        if closure is not None:  # with a backward pass
            closure()

    handle = register_optimizer_step_pre_hook(stop)
    try:
        with patch.object(LightningOptimizer, "step", go_on):
            yield
    finally:
        handle.remove()


def _gradients(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: x.to_dense() if x.is_sparse else x for name, x in grads.items()}


@contextmanager
def _world_of(
    module: nn.Module, shard: SequenceShard, pretence: AbstractContextManager[Any]
) -> Generator[None, None, None]:
    """Make the ranks of ``shard``, this rank alone or its sequence group, the whole world: whoever asks how many ranks there
    are, or communicates, finds these."""
    world = dist.group.WORLD
    assert world is not None
    with ExitStack() as stack:
        stack.enter_context(pretence)
        group = shard.group
        if group is None:
            group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            stack.callback(dist.destroy_process_group, group)
            for part in segment_modules(module):
                if not part.segment_local:
                    stack.callback(part.set_shard, part.shard)
                    part.set_shard(shard)
            for attributes in map(vars, module.modules()):  # users keep what `sequence_shard` has given them
                stack.callback(attributes.update, {x: y for x, y in attributes.items() if isinstance(y, SequenceShard)})
                attributes.update({x: shard for x, y in attributes.items() if isinstance(y, SequenceShard)})
        stack.callback(_update_default_pg, world)
        _update_default_pg(group)
        yield


@contextmanager
def _tables(module: nn.Module, shard: SequenceShard, share: float) -> Generator[dict[str, Tensor], None, None]:
    """Let every positional table stand for ``share`` of its positions, with rows of its own, and yield the rows by name.

    Split, a rank has the first of its rows; whole, all ranks have those of all.
    """
    lent: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for prefix, table in module.named_modules():
            if isinstance(table, SegmentPositionalEmbedding) and table.shard.size > 1:
                weight, count = table.weight, table.num_positions
                rows = weight.detach()[: round(weight.size(0) * share)]
                rows = table.shard.gather(rows, dim=0) if shard.size == 1 else rows
                stack.callback(_set_table, table, weight, count, table.shard)
                stand_in = nn.Parameter(rows, requires_grad=weight.requires_grad)
                _set_table(table, stand_in, round(count * share), shard)
                lent[f"{prefix}.weight"] = stand_in
        yield lent


def _set_table(table: SegmentPositionalEmbedding, weight: nn.Parameter, count: int, shard: SequenceShard) -> None:
    table.weight, table.num_positions, table.shard = weight, count, shard
