"""Prove on the first batch that a run is the training of one device, or say why it is not."""

import math
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.proof.causes import (
    BACKWARD,
    COUNTS,
    FAILS,
    NORMALIZATION,
    POOLING,
    SPLIT_DIMENSION,
    SUM,
    Cause,
    cause_of,
)
from lightning_lss.proof.counts import ignored_values, is_uneven
from lightning_lss.proof.gradients import compare
from lightning_lss.proof.operations import Comparison, Fault, Record
from lightning_lss.proof.passes import Pass, Rehearsal
from lightning_lss.proof.report import Report
from lightning_lss.proof.shorten import sequence_length, short_length, shortened
from lightning_lss.sequence.batch import SequenceDims, map_tensors, tensors_by_path
from lightning_lss.sequence.layout import chunks_per_rank
from lightning_lss.sequence.segment import segment_modules

LONGEST = 2048
"""Longer sequences are never computed whole: on one device attention scores alone may need L^2 numbers a head."""

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""The largest relative error of a gradient, by the least precise dtype of the step. Rounding grows with the depth of a model and
the length of its sums: a right transformer of 12 layers on 512 positions is off by 2e-15, 1e-6 and, with mixed precision, 9e-3.
Faults are off by 0.1 and more, most by 0.3."""

OVERALL = 0.03
"""The largest relative error of all gradients together, where parameters are in half precision: then the sums of single biases
are mostly rounding (the same transformer: 0.4 for the worst bias, and 1e-2 overall)."""

_HALF = (torch.bfloat16, torch.float16)


_MEETINGS: Counter[tuple[int, ...]] = Counter()
"""How often the ranks of a group have met, so that each meeting has names of its own in the store."""


class FirstBatch:
    """The proof of a run on its first batch; every rank of the world must use it.

    Args:
        rehearsal: how to run the module's step.
        batch: whole, as the data loader gives it.
        dims: see :func:`lightning_lss.sequence.batch.split_batch`.
        dtype: the least precise one that the step computes or sends in.
        data_group: the ranks that hold the same segment of other batches; all then prove on the batch of the first.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        batch: Any,
        dims: SequenceDims | None,
        dtype: torch.dtype,
        data_group: dist.ProcessGroup | None,
    ) -> None:
        self.rehearsal, self.dims, self.shard = rehearsal, dims or {}, rehearsal.shard
        trained = [x for x in rehearsal.module.parameters() if x.requires_grad]
        self.by_parameter = not any(x.dtype in _HALF for x in trained)
        self.tolerance, self.data_group = TOLERANCES[dtype] if self.by_parameter else OVERALL, data_group
        self.batch, self.length = batch, sequence_length(batch, self.dims)
        if data_group is not None:
            self.length = _of_first(self.length, data_group)

    def prove(self) -> Report:
        """Compare a few positions of the batch; where these do not agree, or the module cannot run on them, all of them."""
        reports = []
        for length in self._lengths():
            report = self._compare(length)
            if report.exact:
                return report
            reports.append(report)
        wrong = [report for report in reports if not report.unverified]
        return self.inspect(wrong[-1]) if wrong else reports[-1]

    @property
    def _chunks(self) -> int:
        return self.shard.size * chunks_per_rank(self.shard.size, self.shard.layout)

    def _lengths(self) -> Iterator[int]:
        short = short_length(self.length, self.shard.size, self.shard.layout)
        if short < self.length:
            yield short
        if self.length <= LONGEST or short >= self.length:
            yield self.length

    def _report(self, length: int, **found: Any) -> Report:
        return Report(length, self.length, self.shard.size, self.tolerance, self.by_parameter, **found)

    def _compare(self, length: int) -> Report:
        share, batch = length / max(self.length, 1), self.part(length)
        if unknown := _unknown_tables(self.rehearsal.module):
            return self._report(length, unverified=f"{unknown} has parameters of one segment only")
        whole, failure = None, ""
        try:
            whole = self.rehearsal.run(batch, whole=True, share=share)
        except Exception as raised:
            failure = _in_a_line(raised)
        if whole is not None and not whole.gradients:
            failure = "its loss has no gradients"
        elif whole is not None and not all(x.isfinite().all() for x in (whole.loss, *whole.gradients.values())):
            failure = "its loss or its gradients are not finite"
        if self._on_any_rank(bool(failure)):
            return self._report(
                length, unverified=f"on one device the step does not run: {failure or 'see other ranks'}"
            )
        assert whole is not None
        split: Pass | None = None
        error: Exception | None = None
        try:
            split = self.rehearsal.run(batch, whole=False, share=share)
        except Exception as raised:
            error = raised
        if self._any_failed(error):
            return self._report(length, failure=_in_a_line(error) if error else "see other ranks")
        assert split is not None
        average = self.rehearsal.parameters.average
        errors = compare(split.gradients, whole.gradients, self.rehearsal.module, self.shard, average)
        report = self._report(length, gradients=errors, losses=(whole.loss.item(), _mean(split.loss)))
        report.ignored = ignored_values(whole.means, split.means, batch, self.shard.size)
        # the shortened batch may have as many in every segment, by chance
        uneven = is_uneven(self.batch, report.ignored, self.shard, self.dims)
        report.is_uneven = self._on_any_rank(uneven)
        return report

    def part(self, length: int) -> Any:
        """Return the batch that is compared, of ``length`` positions; every rank must call it."""
        batch = (
            shortened(self.batch, self.length, length, self.dims, self._chunks) if length < self.length else self.batch
        )
        return batch if self.data_group is None else _of_first(batch, self.data_group, self.rehearsal.device)

    def _on_any_rank(self, fact: bool) -> bool:
        found = torch.tensor(float(fact), device=self.rehearsal.device)
        dist.all_reduce(found)
        return bool(found > 0)

    def _any_failed(self, error: Exception | None) -> bool:
        """Whether a split pass has failed on any rank of the sequence group; every rank must call it after the pass.

        Ranks meet over the store: where one fails, others may wait for it in attention and never come. It then raises
        ``error``, and its end is theirs.
        """
        ranks = tuple(dist.get_process_group_ranks(self.shard.require_group()))
        _MEETINGS[ranks] += 1
        store, prefix = _get_default_store(), f"lightning_lss/proof/{ranks[0]}/{len(ranks)}/{_MEETINGS[ranks]}"
        keys = [f"{prefix}/{rank}" for rank in ranks]
        store.set(f"{prefix}/{dist.get_rank()}", "failed" if error else "done")
        try:
            store.wait(keys, timedelta(seconds=20 if error else 600))
        except RuntimeError:
            raise error or RuntimeError("Another rank did not finish the proof of the first batch.") from None
        return any(store.get(key) == b"failed" for key in keys)

    # -- why -----------------------------------------------------------------------------------------------------------

    def inspect(self, report: Report) -> Report:
        """Find the outputs of modules that differ, the operations at fault, and their causes; every rank must call it."""
        record = Record()
        self._watch(report, record, whole=True)
        _, report.modules = self._of_all_ranks(self._compared(report, record, repairs=False)[0])
        if report.exact:
            return report
        comparison, repaired = self._compared(report, record, repairs=True)
        faults, _ = self._of_all_ranks(comparison)
        found = [(fault, cause_of(fault, comparison.inputs)) for fault in faults]
        report.faults = _first_of_each(found)
        if repaired is not None and all(math.isfinite(fault.error) for fault in faults):
            report.causes = (
                [COUNTS]
                if report.is_uneven
                else _causes_of_loss(report.losses[0], _mean(repaired), self.tolerance, self.shard.size)
            )
        if not (report.faults or report.causes):
            report.causes = [_cause_of_failure(self.part(report.length)) if report.failure else BACKWARD]
        return report

    def _compared(self, report: Report, record: Record, repairs: bool) -> tuple[Comparison, Tensor | None]:
        """Compare the split step with the whole one, and return its loss, unless it fails."""
        comparison = Comparison(record, self.shard, report.length, self.tolerance, repairs)
        loss: Tensor | None = None
        error: Exception | None = None
        try:
            loss = self._watch(report, comparison, whole=False)
        except Exception as raised:
            error = raised
        return comparison, None if self._any_failed(error) else loss

    def _watch(self, report: Report, watch: Record, whole: bool) -> Tensor:
        share = report.length / max(self.length, 1)
        return self.rehearsal.run(self.part(report.length), whole, share, watch).loss

    def _of_all_ranks(self, comparison: Comparison) -> tuple[list[Fault], dict[str, float]]:
        """Join what the ranks have found: one may be right by chance, as the first is about its positions."""
        found: list[Any] = [None] * self.shard.size
        dist.all_gather_object(found, (comparison.faults, comparison.errors), group=self.shard.require_group())
        worst: dict[Any, Fault] = {}
        errors: dict[str, float] = {}
        for faults, of_modules in found:
            for fault in faults:
                key = (fault.order, fault.operation, fault.file, fault.line)
                if key not in worst or fault.error > worst[key].error:
                    worst[key] = fault
            for name, error in of_modules.items():
                errors[name] = max(error, errors.get(name, 0.0))
        return sorted(worst.values(), key=lambda fault: fault.order), errors


def _cause_of_failure(batch: Any) -> Cause:
    """Name the entry that is least likely to have its sequence where it was cut."""
    named = [(".".join(map(str, path)) or "batch", x) for path, x in tensors_by_path(batch)]
    images = [name for name, x in named if x.dim() >= 4 and x.is_floating_point()]
    name = images[0] if images else ""
    return Cause(*(text.format(name=name) for text in (SPLIT_DIMENSION if images else FAILS)))


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _mean(loss: Tensor) -> float:
    """Average a loss over the world."""
    mean = loss.detach().double().reshape(()) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()


def _of_first(x: Any, group: dist.ProcessGroup, device: torch.device | None = None) -> Any:
    """Return what the first rank of ``group`` has, with its tensors on ``device``."""
    found = [map_tensors(x, lambda _, tensor: tensor.cpu())]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return map_tensors(found[0], lambda _, tensor: tensor.to(device))


def _unknown_tables(module: nn.Module) -> str:
    """Name a module with segment-local parameters of an unknown kind, or nothing."""
    found = (x for x in segment_modules(module) if x.segment_local and not isinstance(x, SegmentPositionalEmbedding))
    return next((type(x).__name__ for x in found), "")


def _causes_of_loss(whole: float, mean: float, tolerance: float, size: int) -> list[Cause]:
    """Return why the ranks' losses do not average to the whole one, where the operations before it are right."""
    if abs(mean - whole) <= min(tolerance, 1e-5) * abs(whole):
        return []
    times = mean / whole if whole else math.inf
    if min(abs(times * size - 1), abs(times / size - 1)) < max(tolerance, 1e-3):
        return [Cause(SUM.what.format(times=times), SUM.write)]
    return [COUNTS]


def _first_of_each(found: list[tuple[Fault, Cause]]) -> list[tuple[Fault, Cause]]:
    """Keep the first fault of each cause. A mean that is part of a normalization is not pooling."""
    normalizes = {fault.module for fault, cause in found if cause.what == NORMALIZATION.what}
    kept: dict[str, tuple[Fault, Cause]] = {}
    for fault, cause in found:
        if not (cause.what == POOLING.what and fault.module in normalizes):
            kept.setdefault(cause.what, (fault, cause))
    return list(kept.values())
