"""Masks to measure, who holds what under them, and what each rank then does: counted from plans, and in real traffic."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.attention import Shape
from lightning_lss import AttentionMask, SequenceShard, lss_attention
from lightning_lss.attention.plan import Plan
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.balance import balance
from lightning_lss.strategy.balancing import CHUNKS
from lightning_lss.testing.collectives import CollectiveCounter, total_bytes

LAYOUTS = ("balanced", "heaviest first", "zigzag", "contiguous")

SIGMA = 1.2  # of the lognormal lengths of documents


# -- masks -------------------------------------------------------------------------------------------------------------


def lognormal(seed: int, median: float) -> Callable[[], float]:
    """Return a function that draws lengths of documents."""
    generator = np.random.default_rng(seed)
    return lambda: float(generator.lognormal(math.log(median), SIGMA))


def uniform(seed: int, least: int, most: int) -> Callable[[], float]:
    """Return a function that draws lengths from ``least`` to ``most``."""
    generator = np.random.default_rng(seed)
    return lambda: int(generator.integers(least, most + 1))


def packed_documents(draw: Callable[[], float], length: int) -> AttentionMask:
    """Pack causal documents of drawn lengths into one sequence; the last one is cut."""
    starts = [0]
    while starts[-1] < length:
        starts.append(min(length, starts[-1] + max(1, round(draw()))))
    return _causal_documents(starts)


def even_documents(number: int, length: int) -> AttentionMask:
    """Return ``number`` causal documents of lognormal lengths that fill ``length``."""
    drawn = np.random.default_rng(0).lognormal(0, SIGMA, number).cumsum()
    return _causal_documents([0, *np.ceil(drawn / drawn[-1] * length).astype(int).tolist()])


def _causal_documents(starts: Sequence[int]) -> AttentionMask:
    return AttentionMask.documents(cu_seqlens=torch.tensor(starts)) & AttentionMask.causal()


# -- who holds what ----------------------------------------------------------------------------------------------------


def places(mask: AttentionMask, length: int, size: int, layout: str) -> list[SequenceShard]:
    """Return the place of every rank in one of :data:`LAYOUTS`."""
    assignment = None
    if layout in ("balanced", "heaviest first"):
        work = mask.chunk_work(length, CHUNKS * size)
        assignment = balance(work.pairs, work.keys, size) if layout == "balanced" else heaviest_first(work.pairs, size)
    name = layout if assignment is None else "balanced"
    return [SequenceShard(rank, size, name, assignment=assignment) for rank in range(size)]


def heaviest_first(pairs: NDArray[np.int64], size: int) -> ChunkAssignment:
    """Give the heaviest chunk that is left to the rank with the least work; every rank gets equally many."""
    ranks: list[tuple[int, int, list[int]]] = [(0, rank, []) for rank in range(size)]
    for chunk in np.argsort(-pairs, kind="stable").tolist():
        load, rank, held = heappop(ranks)
        held.append(chunk)
        full = len(held) == len(pairs) // size
        heappush(ranks, (load + int(pairs[chunk]) + (1 << 60) * full, rank, held))
    return ChunkAssignment(tuple(tuple(sorted(held)) for _, held in sorted(rank[1:] for rank in ranks)))


class Counted(NamedTuple):
    """What each rank does in one call of attention, from its plan."""

    pairs: list[int]
    """Pairs that it computes."""
    received: list[int]
    """Keys that it receives."""
    returned: list[int]
    """Keys of its own whose gradients it receives, once for each rank that has looked at them."""
    others: int
    """Keys that the other ranks hold."""

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean."""
        return max(self.pairs) / statistics.mean(self.pairs)

    @property
    def fraction_received(self) -> list[float]:
        """Keys that each rank receives, of all that others hold."""
        return [keys / self.others for keys in self.received]


def count(mask: AttentionMask, length: int, ranks: Sequence[SequenceShard]) -> Counted:
    """Count what each of ``ranks`` does under ``mask``."""
    plans = [mask.plan(length, place) for place in ranks]
    returned = [_returned(plan, rank) for rank, plan in enumerate(plans)]
    return Counted([plan.pairs for plan in plans], list(plans[0].received), returned, length - length // len(ranks))


def _returned(plan: Plan, rank: int) -> int:
    if plan.needs is None:  # all ranks gather everything
        return plan.received[rank]
    return sum(run.size for other, runs in enumerate(plan.needs) for run in runs if run.owner == rank != other)


# -- traffic ---------------------------------------------------------------------------------------------------------


def traffic(rank: int, ranks: Sequence[SequenceShard], mask: AttentionMask, shape: Shape) -> int:
    """Count the bytes that this rank receives in a forward and a backward pass of attention."""
    place = replace(ranks[rank], group=dist.group.WORLD)
    *leaves, grad = shape.tensors(shape.length // place.size)
    with CollectiveCounter() as counter:
        lss_attention(*(x.requires_grad_() for x in leaves), place, mask=mask).backward(grad)
    return total_bytes(counter.tally)


def check_traffic(received: Sequence[int], planned: Sequence[int]) -> None:
    """End with a sentence if a rank received other bytes than its plan says."""
    for rank, (real, told) in enumerate(zip(received, planned)):
        if real != told:
            raise SystemExit(f"rank {rank} received {real} bytes, and its plan says {told}.")
