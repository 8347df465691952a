"""All ranks of a sequence group in one process and on one device, one after another, without communication.

Every rank's work is run several times. What a rank sends in the n-th collective of a run is written down; in the next
run the n-th collective gives every rank what all of them sent in the run before (in the first, zeros). Keys and values
do not depend on what is received, so they are right from the second run on, their gradients from the third.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.testing.fake_world import Work, fake_world, replaced_collectives

RUNS = 3  # of one layer of attention, until every result is right


class RecordedRanks(ExitStack):
    """``size`` ranks that take turns, to be used in a ``with`` statement.

    Args:
        size: S.
        layout: of the sequence.
        late: whether a collective reads its input only when it is waited for, and until then its output is NaN, but for
            the rank's own part. A buffer that is written or read too early then gives wrong results every time.
    """

    def __init__(self, size: int, layout: str, late: bool = False) -> None:
        super().__init__()
        self.size, self.layout, self.late = size, layout, late
        self._rank = 0
        self._begun = 0  # collectives of the rank in this run
        self._sent: list[dict[int, Tensor]] = [{} for _ in range(size)]
        self._before: list[dict[int, Tensor]] = [{} for _ in range(size)]
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> "RecordedRanks":
        self._group = self.enter_context(fake_world(0, self.size))
        self.enter_context(replaced_collectives(self._all_gather, self._reduce_scatter))
        return self

    def run(self, work: Callable[[SequenceShard], Any]) -> list[Any]:
        """What ``work(shard)`` returns on each rank. It must do the same in every run."""
        for _ in range(RUNS):
            self._before, self._sent, results = self._sent, [{} for _ in range(self.size)], []
            for rank in range(self.size):
                self._rank, self._begun = rank, 0
                results.append(work(SequenceShard(rank, self.size, self.layout, self._group)))
        return results

    def _exchange(self, index: int, own: Tensor) -> list[Tensor]:
        """What every rank sent in collective ``index`` of the run before."""
        self._sent[self._rank][index] = own.clone()
        return [before.get(index, torch.zeros_like(own)) for before in self._before]

    def _all_gather(self, out: Tensor, local: Tensor, group: dist.ProcessGroup, async_op: bool) -> Work:
        slots = out.view(self.size, -1)

        others = [slot for slot in slots if slot.data_ptr() != local.data_ptr()]
        return self._begin(lambda index: torch.stack(self._exchange(index, local), out=slots), others)

    def _reduce_scatter(self, out: Tensor, stacked: Tensor, group: dist.ProcessGroup, async_op: bool) -> Work:
        def scatter(index: int) -> None:
            parts = [sent.view(self.size, -1)[self._rank] for sent in self._exchange(index, stacked)]
            torch.sum(torch.stack(parts), 0, out=out)

        return self._begin(scatter, [out])

    def _begin(self, collective: Callable[[int], object], outputs: list[Tensor]) -> Work:
        index, self._begun = self._begun, self._begun + 1
        if not self.late:
            collective(index)
            return Work()
        for output in outputs:
            output.fill_(torch.nan)
        return Work(lambda: collective(index))
