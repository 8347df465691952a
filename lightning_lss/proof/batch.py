"""Prove on a batch that a run is the training of one device, or say why it is not."""

import math
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.proof.causes import (
    BACKWARD,
    COUNTS,
    FAILS,
    FAILS_SHOWN_WHOLE,
    NORMALIZATION,
    POOLING,
    SHOWN_WHOLE,
    SPLIT_DIMENSION,
    SUM,
    Cause,
    cause_of,
)
from lightning_lss.proof.evenness import Sign, uneven_signs
from lightning_lss.proof.gradients import compare
from lightning_lss.proof.operations import Comparison, Fault, Record
from lightning_lss.proof.passes import Pass, Rehearsal
from lightning_lss.proof.report import Report
from lightning_lss.proof.shorten import sequence_length, short_length, shortened, window_starts
from lightning_lss.sequence.batch import SequenceDims, tensors_by_path
from lightning_lss.sequence.meeting import meet
from lightning_lss.sequence.segment import segment_modules

LONGEST = 2048
"""Longer sequences are never computed whole: on one device attention scores alone may need L^2 numbers a head."""

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""The largest relative error of a gradient, by the least precise dtype of the step. Rounding grows with the depth of a model and
the length of its sums: a right transformer of 12 layers on 512 positions is off by 2e-15, 1e-6 and, with mixed precision, 9e-3.
Faults are off by 0.1 and more, most by 0.3."""

PARTLY_SINGLE = 1e-5
"""The same where a step in float64 computes some of its operators in float32, as many norms do (Gemma 3: 2e-7)."""

OVERALL = 0.03
"""The largest relative error of all gradients together, where parameters are in half precision: then the sums of single biases
are mostly rounding (the same transformer: 0.4 for the worst bias, and 1e-2 overall)."""

_HALF = {torch.bfloat16, torch.float16}


class BatchProof:
    """The proof of a run on one batch. Every rank that rehearses together must use it: a sequence group, each on its own
    batch; with sharded parameters all ranks.

    Args:
        rehearsal: how to run the module's step.
        batch: whole, as the data loader gives it.
        dims: see :func:`lightning_lss.sequence.batch.split_batch`.
        proved: what has been proved with uneven segments, see :mod:`lightning_lss.proof.evenness`.
    """

    def __init__(
        self, rehearsal: Rehearsal, batch: Any, dims: SequenceDims | None, proved: Collection[Sign] = ()
    ) -> None:
        self.rehearsal, self.batch, self.dims, self.shard = rehearsal, batch, dims or {}, rehearsal.shard
        self.group = rehearsal.parameters.rehearsing_group(self.shard.require_group())
        self.length = sequence_length(batch, self.dims)
        uneven = uneven_signs(batch, self.shard, self.dims)
        self.uneven = frozenset(uneven)
        """The signs that this batch proves."""
        news = [x for sign, x in uneven.items() if sign not in proved]
        counts = next(iter((*news, *uneven.values())), None)
        short = short_length(self.length, self.shard)
        self._parts = {self.length: batch}
        if short < self.length:
            kept = short // self.shard.num_chunks
            starts = window_starts(self.length, kept, self.shard, counts)
            part = shortened(batch, self.length, starts, kept, self.dims)
            self._parts = {short + self.length % self.shard.num_chunks: part, **self._parts}

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

    def _lengths(self) -> Iterator[int]:
        """Yield as many lengths as the other ranks."""
        lengths = list(self._parts)
        if self._on_any_rank(len(lengths) > 1):
            yield lengths[0]
            if self._on_any_rank(self.length > LONGEST):
                return
        yield lengths[-1]

    def run(self, length: int, whole: bool, watch: Record | None = None, batch: Any = None) -> Pass:
        """Run the step on ``length`` positions, or on another ``batch`` of as many."""
        part, padding = self._parts[length] if batch is None else batch, self.shard.padding
        return self.rehearsal.run(part, whole, (length + padding) / max(self.length + padding, 1), watch)

    def part(self, length: int) -> Any:
        """Return the whole batch of ``length`` positions."""
        return self._parts[length]

    def _compare(self, length: int) -> Report:
        if unknown := _unknown_tables(self.rehearsal.module):
            return self._report(length, set(), unverified=f"{unknown} has parameters of one segment only")
        whole, failure = self._run_whole(length)
        if self._on_any_rank(bool(failure)):
            reason = f"on one device the step does not run: {failure or 'see other ranks'}"
            return self._report(length, set(), unverified=reason)
        assert whole is not None
        split: Pass | None = None
        error: Exception | None = None
        try:
            split = self.run(length, whole=False)
        except Exception as raised:
            error = raised
        if self._any_failed(error):
            return self._report(length, whole.dtypes, failure=_in_a_line(error) if error else "see other ranks")
        assert split is not None
        losses = self._mean(whole.loss), self._mean(split.loss)
        errors = compare(split.gradients, whole.gradients, self.rehearsal.module, self.shard, self.rehearsal.parameters)
        return self._report(length, whole.dtypes | split.dtypes, gradients=errors, losses=losses)

    def _run_whole(self, length: int) -> tuple[Pass | None, str]:
        """Run the step on one device; say why it cannot be compared with, if so."""
        try:
            whole = self.run(length, whole=True)
        except Exception as error:
            return None, _in_a_line(error)
        if not whole.gradients:
            return None, "its loss has no gradients"
        finite = all(x.isfinite().all() for x in (whole.loss, *whole.gradients.values()))
        return whole, "" if finite else "its loss or its gradients are not finite"

    def _report(self, length: int, dtypes: set[torch.dtype], **found: Any) -> Report:
        """Report what was found, with the tolerance of a step that computes in ``dtypes``."""
        trained = {x.dtype for x in self.rehearsal.module.parameters() if x.requires_grad}
        least = (dtypes & _HALF) | trained | {self.shard.communication_dtype or torch.float64}
        by_parameter, tolerance = not trained & _HALF, max(TOLERANCES.get(x, 0.0) for x in least)
        if torch.float32 in dtypes:
            tolerance = max(tolerance, PARTLY_SINGLE)
        if self.rehearsal.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
            tolerance = max(tolerance, TOLERANCES[torch.bfloat16])  # TensorFloat-32 has few more digits
        tolerance = self._reduced(tolerance, dist.ReduceOp.MAX)  # the verdict may not differ between ranks
        tolerance = tolerance if by_parameter else OVERALL
        return Report(length, self.length, self.shard.size, tolerance, by_parameter, **found)

    # -- other ranks ---------------------------------------------------------------------------------------------------

    def _reduced(self, number: float, operation: Any) -> float:
        value = torch.tensor(number, dtype=torch.float64, device=self.rehearsal.device)
        dist.all_reduce(value, op=operation, group=self.group)
        return value.item()

    def _on_any_rank(self, fact: bool) -> bool:
        return self._reduced(float(fact), dist.ReduceOp.MAX) > 0

    def _mean(self, loss: Tensor) -> float:
        return self._reduced(loss.item(), dist.ReduceOp.SUM) / self.group.size()

    def _any_failed(self, error: Exception | None) -> bool:
        """Whether a split pass has failed on any rank; every rank must call it after the pass.

        Where one fails, others may wait for it in attention and never come. It then raises ``error``, and its end is theirs.
        """
        if isinstance(error, torch.OutOfMemoryError):  # says nothing about the module
            raise error
        first, size = dist.get_process_group_ranks(self.group)[0], self.group.size()
        patience = timedelta(seconds=20) if error else timedelta(minutes=10)
        same = meet(f"proof of {size} from {first}", size, "failed" if error else "done", patience)
        if same is None:
            raise error or RuntimeError("Another rank did not finish the proof of the batch.")
        return error is not None or same < size

    # -- why -----------------------------------------------------------------------------------------------------------

    def inspect(self, report: Report) -> Report:
        """Find the outputs of modules that differ, the operations at fault, and their causes; every rank must call it."""
        if self.rehearsal.shows_whole:  # no line of the user's is at fault
            if not report.exact:
                report.causes = [FAILS_SHOWN_WHOLE if report.failure else SHOWN_WHOLE]
            return report
        record = Record()
        self.run(report.length, whole=True, watch=record)
        _, report.modules = self._of_all_ranks(self._compared(report, record, repairs=False)[0])
        if report.exact:
            return report
        comparison, repaired = self._compared(report, record, repairs=True)
        faults, _ = self._of_all_ranks(comparison)
        report.faults = _first_of_each([(fault, cause_of(fault, comparison.inputs)) for fault in faults])
        # replicas that rehearse together may find different faults, and must all come to the mean
        unrepaired = repaired is None or not all(math.isfinite(fault.error) for fault in faults)
        if not self._on_any_rank(unrepaired):
            assert repaired is not None
            report.causes = _causes_of_loss(report.losses[0], self._mean(repaired), report.tolerance, self.shard.size)
        if not (report.faults or report.causes):
            report.causes = [_cause_of_failure(self.part(report.length)) if report.failure else BACKWARD]
        return report

    def _compared(self, report: Report, record: Record, repairs: bool) -> tuple[Comparison, Tensor | None]:
        """Compare the split step with the whole one, and return its loss, unless it fails."""
        comparison = Comparison(record, self.shard, report.length, report.tolerance, repairs)
        loss: Tensor | None = None
        error: Exception | None = None
        try:
            loss = self.run(report.length, whole=False, watch=comparison).loss
        except Exception as raised:
            error = raised
        return comparison, None if self._any_failed(error) else loss

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
