"""When a strategy proves its runs, and what it does with the verdict; the proof itself is in :mod:`lightning_lss.proof`."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed import ProcessGroup

from lightning_lss.proof.causes import COUNTS, FAILS
from lightning_lss.proof.counts import is_uneven
from lightning_lss.proof.first_batch import FirstBatch
from lightning_lss.proof.passes import Rehearsal
from lightning_lss.proof.report import InexactError, Report
from lightning_lss.sequence.batch import SequenceDims
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard
from lightning_lss.strategy.validation import warn_of_images


class Verification:
    """Proves a run on its first batch, where it is ``wanted``."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.report: Report | None = None
        """Of the last proof."""
        self._batch: Any = None
        self._due = False
        self._rehearsal: Rehearsal | None = None

    def start(self, is_split: bool) -> None:
        """Prove the next training batch of a run, or of one whose parameters have changed, if it is split at all."""
        self._due, self.report = self.wanted and is_split, None

    @contextmanager
    def explains_failure(self, step: str) -> Generator[None, None, None]:
        """Say what an exception of an evaluation step before the proof may come from."""
        try:
            yield
        except Exception as error:
            if not self._due:
                raise
            raise InexactError(
                f"{step} fails on a segment of the batch: {error}\nIf it does not fail on one device, write: {FAILS.write.format()}"
            ) from error

    def forget(self) -> None:
        """Free the batch, once its step begins."""
        self._batch = None

    @property
    def is_due(self) -> bool:
        """Whether the next training step is to be proved."""
        return self._due

    def keep(self, batch: Any, shard: SequenceShard, dims: SequenceDims | None) -> None:
        """Remember the whole batch of the step that is to be proved, and look at those after it.

        Raises:
            InexactError: if the loss is a plain mean, and ``batch`` is the first whose segments count different numbers of
                targets.
        """
        self._batch = batch if self.wanted and shard.size > 1 else None
        ignored = self.report.ignored if self.report is not None and not self._due else {}
        if ignored and is_uneven(batch, ignored, shard, dims or {}):
            raise InexactError(f"{COUNTS.what}\nThis batch is the first where they differ.\n  Write: {COUNTS.write}")

    def first_batch(
        self,
        rehearsal: Rehearsal,
        dims: SequenceDims | None,
        communication_dtype: torch.dtype | None,
        data_group: ProcessGroup | None,
    ) -> FirstBatch:
        """Return the proof of the kept batch, which is then no longer due."""
        self._due, batch, self._batch = False, self._batch, None
        dtype = least_precise(rehearsal.module, rehearsal.precision, communication_dtype)
        self._rehearsal = rehearsal
        return FirstBatch(rehearsal, batch, dims, dtype, data_group)

    def prove(self, first: FirstBatch) -> None:
        """Prove a run, or warn where nothing can be compared.

        Raises:
            InexactError: on every rank, if the step is not that of one device.
        """
        try:
            self.report = report = first.prove()
        finally:
            self._rehearsal = None
        if report.unverified:
            warn_of_unverified(first.rehearsal.module, report.unverified)
            warn_of_images(first.batch, first.dims)
        elif not report.exact:
            raise InexactError(report)

    def ends_manual_step(self, loss: torch.Tensor) -> None:
        """End a rehearsed step at its first manual backward."""
        if self._rehearsal is not None and self._rehearsal.in_step:
            self._rehearsal.end_manual_step(loss)


def least_precise(module: nn.Module, precision: Precision, communication_dtype: torch.dtype | None) -> torch.dtype:
    """Return the least precise dtype that a step of ``module`` computes or sends in."""
    named = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(precision.precision))
    dtypes = {x.dtype for x in module.parameters() if x.requires_grad and x.is_floating_point()}
    dtypes |= {x for x in (named, communication_dtype) if x is not None}
    known = [x for x in dtypes if x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    return max(known, key=lambda x: torch.finfo(x).eps, default=torch.float32)


@contextmanager
def alone(strategy: ParallelStrategy) -> Generator[None, None, None]:
    """Make ``strategy`` say that its process is the only one, and has whole sequences."""
    facts = {
        "cluster_environment": _OneProcess(),
        "parallel_devices": [strategy.root_device],
        "_requested_size": 1,
        "_shard": WHOLE_SEQUENCE,
        "num_nodes": 1,
    }
    with ExitStack() as stack:
        for name in facts:
            stack.callback(setattr, strategy, name, getattr(strategy, name))
        for name, value in facts.items():
            setattr(strategy, name, value)
        yield


class _OneProcess(LightningEnvironment):
    """The environment of a run with one process."""

    def world_size(self) -> int:
        """One."""
        return 1

    def global_rank(self) -> int:
        """The first."""
        return 0

    def local_rank(self) -> int:
        """The first."""
        return 0


def warn_of_unverified(module: nn.Module, why: str) -> None:
    """Say in one line that a run was not proved, and name the modules that are most often wrong."""
    names = suspects(module)
    hint = f" Recurrences and convolutions do not see across segments: {', '.join(names)}." if names else ""
    rank_zero_warn(f"The run was not proved to be the training of one device: {why}.{hint}")


def suspects(module: nn.Module) -> list[str]:
    """Name the recurrent layers of ``module``, and its convolutions over more than one position."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    return [name for name, x in module.named_modules() if isinstance(x, kinds) or _is_wide_convolution(x)]


def _is_wide_convolution(x: nn.Module) -> bool:
    return isinstance(x, nn.modules.conv._ConvNd) and any(size > 1 for size in x.kernel_size)
