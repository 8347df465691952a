"""What a proof found, as data and in words."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lss.proof.causes import Cause
from lightning_lss.proof.gradients import GradientError
from lightning_lss.proof.operations import Fault


class Leak(NamedTuple):
    """Which outputs move when one position of a batch entry changes."""

    entry: str
    position: int
    module: str
    """Whose output it is: the last with the whole sequence."""
    on_one: list[int]
    """Positions that move on one rank."""
    on_all: list[int]
    """Positions that move where the sequence is split."""


@dataclass
class Report:
    """The first batch whole and split, compared.

    Attributes:
        length: positions of the batch that was compared.
        of_length: positions of the batch as the data loader gave it.
        size: S, the ranks that shared it.
        tolerance: the largest relative error that rounding explains.
        by_parameter: whether it is that of each gradient, or else that of all together.
        gradients: every trained parameter, the worst first.
        losses: of the whole batch, and the mean of the ranks' losses.
        causes: what is wrong with the loss, or the step as a whole.
        faults: operations whose results differ, in the order of the step, each with its cause.
        modules: the largest relative error of each module's output, in the order of the step; filled in for a run that is
            not exact, and by :func:`lightning_lss.verify`.
        leaks: what one token reaches; filled in by :func:`lightning_lss.verify`.
        failure: the exception that the step raised on a segment, or empty.
        unverified: why nothing could be compared, or empty.
        remedy: what else may make the run exact, or empty.
    """

    length: int
    of_length: int
    size: int
    tolerance: float
    by_parameter: bool = True
    gradients: list[GradientError] = field(default_factory=list)
    losses: tuple[float, float] = (0.0, 0.0)
    faults: list[tuple[Fault, Cause]] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    modules: dict[str, float] = field(default_factory=dict)
    leaks: list[Leak] = field(default_factory=list)
    failure: str = ""
    unverified: str = ""
    remedy: str = ""

    @property
    def overall_error(self) -> float:
        """||split - whole|| / ||whole|| of all gradients together."""
        norm = math.hypot(*(x.norm for x in self.gradients))
        return math.hypot(*(x.error * x.norm for x in self.gradients)) / norm if norm else 0.0

    @property
    def wrong(self) -> list[GradientError]:
        """The gradients that differ by more than rounding explains."""
        if not self.by_parameter and self.overall_error <= self.tolerance:
            return []
        return [x for x in self.gradients if not x.error <= self.tolerance]

    @property
    def exact(self) -> bool:
        """Whether all gradients agree."""
        return not (self.failure or self.unverified or self.wrong)

    def __str__(self) -> str:
        """Say in words why the run is not the training of one device."""
        if self.exact:
            return f"exact: {len(self.gradients)} gradients within {self.gradients[0].error:.1e} of those of one device"
        if self.unverified:
            return f"not proved: {self.unverified}"
        return "\n".join([self._finding(), *self._explanations(), *filter(None, [self.remedy]), _OFF])

    @property
    def cause(self) -> str:
        """The first cause in a sentence; of a run without any, what was found."""
        causes = [*(cause for _, cause in self.faults), *self.causes]
        where = f"In {self.faults[0][0].module}: " if self.faults else ""
        return f"{where}{causes[0].what}" if causes else self._finding()

    def _finding(self) -> str:
        part = f", shortened to {self.length} of {self.of_length} positions" if self.length < self.of_length else ""
        start = f"This run would not be the training of one device. On the batch of this step{part}, "
        if self.failure:
            return f"{start}the step fails on a segment, though not on the whole: {self.failure}"
        wrong = self.wrong
        differs = ((name, error) for name, error in self.modules.items() if error > self.tolerance)
        module = next(
            (f" The first output that differs is that of {x} (off by {error:.2g})." for x, error in differs), ""
        )
        return (
            f"{start}the gradients of {len(wrong)} of {len(self.gradients)} parameters over {self.size} ranks are not those"
            f" of one device, the most that of {wrong[0].name} (relative error {wrong[0].error:.2g}; rounding explains"
            f" {self.tolerance:.0e}).{module}"
        )

    def _explanations(self) -> list[str]:
        lines: list[str] = []
        for fault, cause in self.faults:
            lines += [f"{self._start(bool(lines))}{_located(fault)}", f"  {cause.what}", f"  Write: {cause.write}"]
        for cause in self.causes:
            lines += [f"{self._start(bool(lines))}{cause.what}", f"  Write: {cause.write}"]
        return lines

    @staticmethod
    def _start(is_later: bool) -> str:
        return "Also: " if is_later else "First: "


_OFF = "(LSSStrategy(verify=False) starts the run all the same.)"


def _located(fault: Fault) -> str:
    by = "of another shape" if fault.error == float("inf") else f"off by {fault.error:.2g}"
    what = f"fails ({fault.message.splitlines()[0]})" if fault.message else f"is {by}"
    return f"in {fault.module}, `{fault.source}` {what} ({fault.file}:{fault.line})"


class InexactError(MisconfigurationException):
    """The training would not be that of one device; ``report`` holds what was found."""

    def __init__(self, report: Report | str) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[type["InexactError"], tuple[Report | str]]:
        return InexactError, (self.report,)
