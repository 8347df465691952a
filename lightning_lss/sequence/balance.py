"""Give the chunks of a sequence to ranks so that all have the same work and few keys are sent.

A rank holds C / S chunks. It receives, for each chunk that it does not hold, the largest number of keys that any of its
own chunks looks at there. So chunks of one document belong together, and the work of its last ones must be spread.

The search starts from layouts that are good at one of the two, and swaps chunks between pairs of ranks while that makes
things better. Every rank runs it by itself and must find the same. Therefore all sums are of integers that floating
point holds exactly, in whatever order a processor adds them.
"""

from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_lss.sequence.assignment import ChunkAssignment, static_assignment

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

TOLERANCE = 0.03
"""By how much the busiest rank may have more work than the mean, for fewer keys."""

_PRICE = 5.0
"""What work above the tolerance costs: that of one rank's mean, for which all wait, as much as so many whole sequences of
keys for each."""

_WAIT = 0.1
"""The same for work below it."""

_COLUMNS = 64  # overlaps of keys are estimated on so many columns
_UNITS = 2**20  # all work, and 2^24 is the largest integer below which float32 holds all
_LARGE = 128  # more chunks than this are searched from one start only


def balance(pairs: Integers, keys: Integers, size: int) -> ChunkAssignment:
    """Assign C chunks to ``size`` ranks, equally many to each.

    Args:
        pairs: int64 [C], the work of each chunk's queries.
        keys: int64 [C, C], how many keys of chunk j the queries of chunk i look at.
        size: number of ranks S, a divisor of C.

    Returns:
        the assignment, the same wherever it is computed. A static layout is returned where none better is found.
    """
    starts = _static_owners(len(pairs), size)
    if size == 1 or not pairs.any():
        return _assignment(starts[0], size)
    search = _Search(pairs, keys, size)
    starts.append(_heaviest_first(pairs, size))
    if len(pairs) > _LARGE:
        starts = [min(starts, key=search.cost)]
    rounds = min(16, 1 + 2**17 // len(pairs) ** 2)  # one takes 0.1 ms for 64 chunks, 5 ms for 512
    return _assignment(min([search.improve(owners, rounds) for owners in starts], key=search.cost), size)


def imbalance(pairs: Integers, assignment: ChunkAssignment) -> float:
    """Return the work of the busiest rank over the mean, where chunk c has ``pairs[c]``; 1 where there is no work."""
    loads = pairs[assignment.tensor.numpy()].sum(1)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def causal_work(length: int, num_chunks: int) -> tuple[Integers, Integers]:
    """Return pairs [C] and keys [C, C] of a causal mask, see :func:`balance`."""
    chunk, index = length // num_chunks, np.arange(num_chunks)
    pairs = index * chunk**2 + chunk * (chunk + 1) // 2
    return pairs, chunk * (index[:, None] >= index).astype(np.int64)


# -- starts ------------------------------------------------------------------------------------------------------------


def _static_owners(num_chunks: int, size: int) -> list[Integers]:
    """Return the rank of every chunk under contiguous, and under zigzag where the chunks can be divided so."""
    found = []
    for layout in ("contiguous", "zigzag"):
        coarse = static_assignment(size, layout)
        if num_chunks % coarse.num_chunks == 0:
            ranks = np.empty(coarse.num_chunks, np.int64)
            ranks[coarse.tensor.numpy().ravel()] = np.repeat(np.arange(size), coarse.per_rank)
            found.append(np.repeat(ranks, num_chunks // coarse.num_chunks))
    return found


def _heaviest_first(pairs: Integers, size: int) -> Integers:
    """Give the heaviest chunk to the rank with the least work, among those that have chunks to come."""
    owners, own = np.empty(len(pairs), np.int64), len(pairs) // size
    ranks = [(0, rank, own) for rank in range(size)]
    for chunk, work in zip(np.argsort(-pairs, kind="stable").tolist(), np.sort(pairs)[::-1].tolist()):
        load, rank, free = heappop(ranks)
        owners[chunk] = rank
        if free > 1:
            heappush(ranks, (load + work, rank, free - 1))
    return owners


def _assignment(owners: Integers, size: int) -> ChunkAssignment:
    """Name the ranks by their first chunks."""
    first = np.argsort([np.argmax(owners == rank) for rank in range(size)], kind="stable")
    names = np.empty(size, np.int64)
    names[first] = np.arange(size)
    return ChunkAssignment.from_owners(torch.from_numpy(names[owners]), size)


# -- search ------------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """An assignment in the order of the search: chunks rank by rank."""

    order: Integers  # the chunks, [C]
    loads: Floats  # work of each rank, [S]
    received: Floats  # keys that each rank receives, [S]
    others: Floats  # what the other chunks of a chunk's rank look at; all of the columns that they hold, [C, C]


class _Search:
    """Swap chunks of ``pairs`` work that look at ``keys`` between ``size`` ranks."""

    def __init__(self, pairs: Integers, keys: Integers, size: int) -> None:
        count = len(pairs)
        self.pairs, self.keys, self.size, self.own = pairs, keys, size, count // size
        group = count // _COLUMNS if count % _COLUMNS == 0 else 1
        levels = 2 ** int(np.log2(2**23 / (group * count)) / 2)  # products of two, summed, are below 2^23
        self.chunk = max(1, int(keys.max()))
        self.looks = np.ceil(keys * levels / self.chunk).astype(np.float32)  # in levels of a chunk
        self.levels = np.float32(levels)
        total = int(pairs.sum())
        shift = max(0, total.bit_length() - 40)  # so that the product is below 2^63
        self.work = ((pairs >> shift) * _UNITS // max(total >> shift, 1)).astype(np.float32)
        self.mean = np.float32(_UNITS / size)
        self.cap = self.mean * np.float32(1 + TOLERANCE)
        self.price = np.float32(_PRICE * size * levels * count) / self.mean
        self.totals, self.diagonal = self.looks.sum(1), self.looks.diagonal().copy()
        self.group, self.columns = group, np.ascontiguousarray(_in_columns(self.looks, group).T)

    def cost(self, owners: Integers) -> float:
        """Return the keys that all ranks receive, and the price of uneven work."""
        busiest = int(_loads(self.pairs, owners, self.size).max()) * self.size / int(self.pairs.sum())
        price = _PRICE * max(0.0, busiest - 1 - TOLERANCE) + _WAIT * (busiest - 1)
        return int(_received(self.keys, owners, self.size).sum()) + price * self.size * len(owners) * self.chunk

    def improve(self, owners: Integers, rounds: int) -> Integers:
        """Swap chunks, in each round at most one of every rank, as long as it lowers the cost."""
        owners = best = owners.copy()
        lowest = self.cost(best)
        for _ in range(rounds):
            owners = owners.copy()
            if not self._swap(owners):
                break
            if (cost := self.cost(owners)) < lowest:
                best, lowest = owners, cost
        return best

    def _swap(self, owners: Integers) -> bool:
        """Make the best swaps of disjoint pairs of ranks; return whether there was any."""
        size, own = self.size, self.own
        state = self._state(owners)
        gains = self._gains(state)  # [S, S, n n]
        best = gains.min(2)
        first, second = np.nonzero(np.triu(best < -1e-3 * self.levels))
        sequence = np.argsort(best[first, second], kind="stable")
        free, found = [True] * size, False
        for a, b in zip(first[sequence].tolist(), second[sequence].tolist()):
            if free[a] and free[b]:
                x, y = divmod(int(gains[a, b].argmin()), own)
                owners[state.order[a * own + x]], owners[state.order[b * own + y]] = b, a
                free[a] = free[b] = False
                found = True
        return found

    def _state(self, owners: Integers) -> _State:
        size, own = self.size, self.own
        order = np.argsort(owners, kind="stable")
        ranks, held = np.arange(size)[:, None], order.reshape(size, own)
        looks = self.looks[order].reshape(size, own, -1)
        most = looks.max(1)
        is_most = looks == most[:, None]
        second = np.where(is_most, 0, looks).max(1)
        second = np.where(is_most.sum(1) > 1, most, second)
        others = np.where(is_most, second[:, None], most[:, None])
        received = most.sum(1) - most[ranks, held].sum(1)
        kept = others[ranks, np.arange(own), held]
        others.transpose(0, 2, 1)[ranks, held] = self.levels
        others[ranks, np.arange(own), held] = kept
        loads = self.work[order].reshape(size, own).sum(1)
        return _State(order, loads, received, others.reshape(size * own, -1))

    def _gains(self, state: _State) -> Floats:
        """Return the change in cost for a swap of each pair of chunks, [S, S, n n] by rank; 0 within a rank.

        A rank with one chunk replaced receives the sum over columns of max(a, b), what its others or the new one look
        at. That is a + b - min(a, b), and the minimum is estimated as a product, since most numbers are 0 or a whole
        chunk.
        """
        size, own, order = self.size, self.own, state.order
        change = _in_columns(state.others, self.group) @ self.columns
        change /= -self.levels * np.float32(self.group)
        change += self.totals
        held = (own - 1) * self.levels + np.repeat(state.received, own)
        change += (state.others.sum(1) - held)[:, None]
        change -= np.maximum(state.others, self.diagonal)  # the new one is not received
        change = change[:, order]
        change = change + change.T
        loads, work = np.repeat(state.loads, own), self.work[order]
        excess = (loads - work)[:, None] + work
        np.maximum(excess, self.cap, out=excess)
        excess = excess + excess.T
        before = np.maximum(loads, self.cap)
        excess -= before[:, None]
        excess -= before
        excess *= self.price
        change += excess
        by_rank = change.reshape(size, own, size, own).transpose(0, 2, 1, 3).reshape(size, size, -1)
        by_rank[np.arange(size), np.arange(size)] = 0
        return by_rank


def _in_columns(x: Floats, group: int) -> Floats:
    """Sum every ``group`` columns."""
    return x.reshape(len(x), -1, group).sum(2)


def _loads(pairs: Integers, owners: Integers, size: int) -> Integers:
    return pairs[np.argsort(owners, kind="stable")].reshape(size, -1).sum(1)


def _received(keys: Integers, owners: Integers, size: int) -> Integers:
    held = np.argsort(owners, kind="stable").reshape(size, -1)
    most = keys[held].max(1)
    return most.sum(1) - most[np.arange(size)[:, None], held].sum(1)
