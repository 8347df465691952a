"""All ranks of a sequence group in one process and on one device, one after another, without a process group.

Every rank's work is run several times. What a rank sends in the n-th collective of a run is written down; in the next
run the n-th collective gives every rank what all of them sent in the run before (in the first, zeros). Keys and values
do not depend on what is received, so they are right from the second run on, their gradients from the third.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lss.attention import exchange
from lightning_lss.sequence.collectives import Pending
from lightning_lss.sequence.segment import SequenceShard

RUNS = 3  # of one layer of attention, until every result is right


class RecordedRanks:
    """In the place of the collectives of attention for ``size`` ranks."""

    def __init__(self, size: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.layout = size, layout
        self._rank = 0
        self._sent: list[list[Tensor]] = [[] for _ in range(size)]
        self._before: list[list[Tensor]] = [[] for _ in range(size)]
        monkeypatch.setattr(exchange, "all_gather", self._all_gather)
        monkeypatch.setattr(exchange, "reduce_scatter", self._reduce_scatter)
        monkeypatch.setattr(exchange, "is_gloo", lambda x, group: False)

    def run(self, work: Callable[[SequenceShard], Any]) -> list[Any]:
        """What ``work(shard)`` returns on each rank."""
        for _ in range(RUNS):
            self._before, self._sent = self._sent, [[] for _ in range(self.size)]
            results = [self._work_as(rank, work) for rank in range(self.size)]
        return results

    def _work_as(self, rank: int, work: Callable[[SequenceShard], Any]) -> Any:
        self._rank = rank
        return work(SequenceShard(rank, self.size, self.layout, object()))  # type: ignore[arg-type]

    def _exchange(self, own: Tensor) -> list[Tensor]:
        """What every rank sent in this collective in the run before."""
        index = len(self._sent[self._rank])
        self._sent[self._rank].append(own.clone())
        known = all(len(before) > index for before in self._before)
        return [before[index] if known else torch.zeros_like(own) for before in self._before]

    def _all_gather(self, local: Tensor, group: object, out: Tensor | None = None) -> Pending:
        gathered = local.new_empty(self.size, *local.shape) if out is None else out
        return Pending(torch.stack(self._exchange(local), out=gathered))

    def _reduce_scatter(self, stacked: Tensor, group: object) -> Pending:
        return Pending(torch.stack([sent[self._rank] for sent in self._exchange(stacked)]).sum(0))
