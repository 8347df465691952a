"""When a strategy proves its runs, and what it does with the verdict; the proof itself is in :mod:`lightning_lss.proof`."""

import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed import ProcessGroup

from lightning_lss.nn.convolution import crosses_borders
from lightning_lss.proof.batch import BatchProof
from lightning_lss.proof.causes import FAILS
from lightning_lss.proof.evenness import Sign, uneven_signs
from lightning_lss.proof.passes import Rehearsal
from lightning_lss.proof.report import InexactError, Report
from lightning_lss.proof.shorten import POSITIONS, sequence_length
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.batch import SequenceDims
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.strategy.validation import warn_of_images


class Verification:
    """Decides which batches of a run are proved, where that is ``wanted``, and what follows from the verdict."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.report: Report | None = None
        """Of the last proof."""
        self.batch: Any = None
        """The whole one of the next step."""
        self.proved: frozenset[Sign] = frozenset()
        """What was proved with uneven segments, see :mod:`lightning_lss.proof.evenness`."""
        self._first: ChunkAssignment | None = None  # of the batches that were looked at
        self._news: frozenset[Sign] = frozenset()
        self._layout: Sign | None = None  # of the next step
        self._exact_layouts: set[Sign] = set()
        self.is_due = False
        """Whether the next training step is to be proved."""
        self.rehearsal: Rehearsal | None = None
        """That of the proof that goes on."""

    def start(self) -> None:
        """Prove the next training step of a run, or of one whose parameters have changed."""
        self.is_due, self.report, self.proved, self._first = self.wanted, None, frozenset(), None
        self._exact_layouts.clear()

    def look_at(self, batch: Any, shard: SequenceShard, dims: SequenceDims | None) -> None:
        """Look at the training batch of the next step for what was not proved yet: entries that are the first with uneven
        segments, sequences that are the first of which so much is padding, a layout that is the first of its kind, or the
        first other than that of the first balanced batch: a module that keeps the shard or the positions of another one would
        go unseen."""
        if not self.wanted:
            self._news = frozenset()
            return
        self._first = self._first or shard.assignment
        self._layout = layout = self._sign_of(shard)
        signs = {layout} | (
            _padding_signs(sequence_length(batch, dims or {}), shard.padding) if shard.padding else set()
        )
        self._news = frozenset(uneven_signs(batch, shard, dims or {}, self.proved)) | (signs - self.proved)

    def _sign_of(self, shard: SequenceShard) -> Sign:
        return (), f"layout {shard.layout}{'' if shard.assignment in (None, self._first) else ', another'}"

    def has_proved(self, shard: SequenceShard) -> bool:
        """Whether a training step of the run under such a layout was proved."""
        return self._sign_of(shard) in self._exact_layouts

    @property
    def has_news(self) -> bool:
        """Whether the next step is to be proved for what its batch shows."""
        return bool(self._news)

    @contextmanager
    def explains_failure(self, step: str) -> Generator[None, None, None]:
        """Say what an exception of an evaluation step before the proof may come from."""
        try:
            yield
        except Exception as error:
            if not self.is_due:
                raise
            raise InexactError(
                f"{step} fails on a segment of the batch: {error}\nIf it does not fail on one device, write: {FAILS.write.format()}"
            ) from error

    def batch_proof(self, rehearsal: Rehearsal, dims: SequenceDims | None) -> BatchProof:
        """Return the proof of the kept batch, which is then no longer due."""
        self.is_due, batch, self.batch = False, self.batch, None
        self.rehearsal = rehearsal
        return BatchProof(rehearsal, batch, dims, self.proved)

    def prove(self, proof: BatchProof, replicas: ProcessGroup | None, remedy: str = "") -> None:
        """Prove a run, or warn where nothing can be compared. ``replicas`` are data replicas that prove their batches now too.
        A refusal ends with the ``remedy``.

        Raises:
            InexactError: if the step is not that of one device, also if only a replica's is not.
        """
        try:
            self.report = report = proof.prove()
        finally:
            self.rehearsal = None
        if report.unverified:
            warn_of_unverified(proof.rehearsal.module, report.unverified)
            if not proof.rehearsal.shows_whole:
                warn_of_images(proof.batch, proof.dims)
        elif not report.exact:
            report.remedy = remedy
            first_of(str(report), replicas)
            raise InexactError(report)
        if refusal := first_of("", replicas):
            raise InexactError(refusal)
        self.proved |= proof.uneven | self._news
        if report.exact and self._layout is not None:
            self._exact_layouts.add(self._layout)


def _padding_signs(length: int, padding: int) -> set[Sign]:
    """The signs of sequences of ``length`` that are filled up by ``padding``: one for each halving of the share that the proof,
    which shortens them, sees of it. What counts a little padding may be lost in rounding, and would count more of it."""
    return {((), f"a part in {2**n} is padding") for n in range((min(length, POSITIONS) // padding).bit_length(), 11)}


def first_of(own: str, replicas: ProcessGroup | None) -> str:
    """Return what a data replica has to say, if any; each must call it."""
    if replicas is None:
        return own
    found: list[Any] = [None] * replicas.size()
    dist.all_gather_object(found, own, group=replicas)
    return next((x for x in found if x), "")


@contextmanager
def pretend(strategy: ParallelStrategy, shard: SequenceShard) -> Generator[None, None, None]:
    """Make ``strategy`` say that the ranks of ``shard`` are all there are."""
    facts = {
        "cluster_environment": _Environment(shard),
        "parallel_devices": [strategy.root_device] * shard.size,
        "_requested_size": shard.size,
        "_shard": shard,
        "num_nodes": 1,
    }
    with ExitStack() as stack:
        for name in facts:
            stack.callback(setattr, strategy, name, getattr(strategy, name))
        for name, value in facts.items():
            setattr(strategy, name, value)
        yield


class _Environment(LightningEnvironment):
    """The environment of a run whose only ranks are those of ``shard``."""

    def __init__(self, shard: SequenceShard) -> None:
        super().__init__()
        self._shard = shard

    def world_size(self) -> int:
        """S."""
        return self._shard.size

    def global_rank(self) -> int:
        """The segment."""
        return self._shard.rank

    def local_rank(self) -> int:
        """The same."""
        return self._shard.rank


def warn_of_unverified(module: nn.Module, why: str) -> None:
    """Say in one line that a run was not proved, and name the modules that are most often wrong."""
    names = suspects(module)
    hint = f" Recurrences and convolutions do not see across segments: {', '.join(names)}." if names else ""
    rank_zero_warn(f"The run was not proved to be the training of one device: {why}.{hint}")


def suspects(module: nn.Module) -> list[str]:
    """Name the recurrent layers of ``module``, and its convolutions over more than one position."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    return [name for name, x in module.named_modules() if isinstance(x, kinds) or _is_blind(x)]


def _is_blind(x: nn.Module) -> bool:
    """Whether it is a convolution over more than one position, all of its segment."""
    return isinstance(x, nn.modules.conv._ConvNd) and any(n > 1 for n in x.kernel_size) and not crosses_borders(x)


def warn_of_layout(refusal: InexactError) -> None:
    """Say that a sequence group goes on with zigzag, and why."""
    report = refusal.report
    cause = report if isinstance(report, str) else report.cause
    warnings.warn(
        "layout='auto' stays with zigzag for the rest of this run, whose training is that of one device: under the balanced layout"
        f" of this batch it would not be. {cause.splitlines()[0]} Write LSSStrategy(layout='zigzag') to have it from the start.",
        stacklevel=2,
    )
