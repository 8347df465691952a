"""Which rank holds which chunks of a sequence, as one value: ``ChunkAssignment``."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkAssignment:
    """Which of ``num_chunks`` equal chunks of a sequence each rank holds, and in which order.

    Args:
        chunks: by rank, indices of chunks in ascending order. Every rank has the same number.

    Raises:
        ValueError: if a chunk is missing or held twice, or ranks hold different numbers or unordered ones.
    """

    chunks: tuple[tuple[int, ...], ...]
    tensor: Tensor = field(init=False, compare=False, repr=False)
    """The same, int64 [S, n] on the CPU. Compiled code may read nothing else: tuples that change would be compiled anew."""

    def __post_init__(self) -> None:
        held = sorted(index for own in self.chunks for index in own)
        ordered = all(list(own) == sorted(own) for own in self.chunks)
        if not held or held != list(range(len(held))) or len({len(own) for own in self.chunks}) > 1 or not ordered:
            raise ValueError(
                f"chunks={self.chunks} must give each of the chunks 0, 1, 2, ... to one rank, every rank equally many in ascending order."
            )
        with torch.inference_mode(False):  # training may follow a validation with the same assignment
            object.__setattr__(self, "tensor", torch.tensor(self.chunks, dtype=torch.int64, device="cpu"))

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "ChunkAssignment":
        """Return the assignment whose ``tensor`` is given."""
        return _assignment(tuple(map(tuple, tensor.tolist())))

    @classmethod
    def from_owners(cls, owners: Tensor, size: int) -> "ChunkAssignment":
        """Return the assignment that gives every chunk to the rank that ``owners``, int [C], names."""
        return cls.from_tensor(owners.argsort(stable=True).view(size, -1))

    @property
    def size(self) -> int:
        """Number of ranks S."""
        return len(self.chunks)

    @property
    def per_rank(self) -> int:
        """Number of chunks that every rank holds, n."""
        return len(self.chunks[0])

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the whole sequence, S n."""
        return self.size * self.per_rank

    def refined(self, times: int) -> "ChunkAssignment":
        """Return the same positions as an assignment of chunks that are cut into ``times`` equal ones."""
        return ChunkAssignment(tuple(tuple(c * times + i for c in own for i in range(times)) for own in self.chunks))

    # A value: copies share it, and only the indices are sent to other processes.
    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "ChunkAssignment":
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkAssignment, (self.chunks,)


@lru_cache(maxsize=16)  # attention asks for that of the batch in every layer
def _assignment(chunks: tuple[tuple[int, ...], ...]) -> ChunkAssignment:
    return ChunkAssignment(chunks)


@lru_cache(maxsize=64)
def static_chunks(size: int, layout: str) -> tuple[tuple[int, ...], ...]:
    """Return which chunks each of ``size`` ranks holds under ``contiguous`` or ``zigzag``, whatever the batch."""
    if layout == "zigzag" and size > 1:
        return tuple((rank, 2 * size - 1 - rank) for rank in range(size))
    return tuple((rank,) for rank in range(size))


def static_assignment(size: int, layout: str) -> ChunkAssignment:
    """Return :func:`static_chunks` as an assignment."""
    return ChunkAssignment(static_chunks(size, layout))
