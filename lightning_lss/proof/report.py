"""What a proof found, as data and in words."""

from dataclasses import dataclass, field

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lss.proof.causes import Cause
from lightning_lss.proof.gradients import GradientError
from lightning_lss.proof.operations import Fault


@dataclass
class Report:
    """The first batch whole and split, compared.

    Attributes:
        length: positions of the batch that was compared.
        of_length: positions of the batch as the data loader gave it.
        size: S, the ranks that shared it.
        tolerance: the largest relative error that rounding explains.
        gradients: every trained parameter, the worst first.
        losses: of the whole batch, and the mean of the ranks' losses.
        faults: operations whose results differ, in the order of the step, each with its cause.
        modules: the largest relative error of each module's output, in the order of the step.
        failure: the exception that the step raised on a segment, or empty.
        unverified: why nothing could be compared, or empty.
    """

    length: int
    of_length: int
    size: int
    tolerance: float
    gradients: list[GradientError] = field(default_factory=list)
    losses: tuple[float, float] = (0.0, 0.0)
    faults: list[tuple[Fault, Cause]] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    modules: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    unverified: str = ""

    @property
    def exact(self) -> bool:
        """Whether all gradients agree."""
        return not (self.failure or self.unverified) and all(x.error <= self.tolerance for x in self.gradients)

    def __str__(self) -> str:
        """Say in words why the run is not the training of one device."""
        return "\n".join([self._finding(), *self._explanations(), _OFF])

    def _finding(self) -> str:
        part = f", shortened to {self.length} of {self.of_length} positions" if self.length < self.of_length else ""
        start = f"This run would not be the training of one device. On its first batch{part}, "
        if self.failure:
            return f"{start}the step fails on a segment, though not on the whole: {self.failure}"
        wrong = [x for x in self.gradients if x.error > self.tolerance]
        return (
            f"{start}the gradients of {len(wrong)} of {len(self.gradients)} parameters over {self.size} ranks are not those"
            f" of one device, the most that of {wrong[0].name} (relative error {wrong[0].error:.2g}; rounding explains"
            f" {self.tolerance:.0e})."
        )

    def _explanations(self) -> list[str]:
        lines = []
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
