"""A rank's place in its sequence group, and the modules that take one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_lss.sequence.collectives import all_gather, reduce_scatter
from lightning_lss.sequence.layout import (
    check_layout,
    chunks_of_rank,
    chunks_per_rank,
    holder_of_chunks,
    position_ranges,
)


@dataclass(frozen=True)
class SequenceShard:
    """A rank's place in its sequence group.

    Args:
        rank: index of the segment, in ``[0, size)``.
        size: number of ranks S that share one sequence.
        layout: which positions a rank holds, ``contiguous`` or ``zigzag`` (see :mod:`lightning_lss.sequence.layout`).
        group: process group of the S ranks, in segment order; needed by whatever communicates.
        communication_dtype: floating-point type in which keys, values and their gradients travel between the ranks,
            such as ``torch.bfloat16`` for half the bytes of float32; None for the dtype that they are computed in.

    Raises:
        ValueError: if ``rank`` is not in ``[0, size)`` or the layout is unknown.
    """

    rank: int = 0
    size: int = 1
    layout: str = "zigzag"
    group: dist.ProcessGroup | None = None
    communication_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_layout(self.layout)
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank={self.rank} is no place in a sequence group of size={self.size}: use 0 to {self.size - 1}."
            )

    def local_length(self, length: int) -> int:
        """Positions per rank, L / S; raises ``ValueError`` if ``length`` cannot be divided evenly."""
        return sum(map(len, position_ranges(length, self.rank, self.size, self.layout)))

    def positions(self, local_length: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the local tokens, int64 [l]."""
        runs = position_ranges(local_length * self.size, self.rank, self.size, self.layout)
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's segment of ``x`` along ``dim``: [..., L, ...] -> [..., l, ...].

        Differentiable; the gradient reaches only the rank's own segment. Raises ``ValueError`` if L cannot be shared
        out.
        """
        if self.size == 1:
            return x
        runs = position_ranges(x.size(dim), self.rank, self.size, self.layout)
        parts = [x.narrow(dim, run.start, len(run)) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence in its original order, on every rank: [..., l, ...] -> [..., L, ...].

        Differentiable. The adjoint is exact: gradients of the gathered tensor are summed over the ranks and each rank
        gets those of its own segment (a reduce-scatter; slicing the local gradient would lose what other ranks' losses
        say).
        """
        if self.size == 1:
            return x
        return _Gather.apply(x, self, dim % x.dim())

    def chunks_in_order(self, stacked: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Views of segments stacked by rank [S, ..., l, ...], chunk by chunk in position order; ``dim`` is that of l in
        a segment."""
        chunk = stacked.size(1 + dim) // chunks_per_rank(self.size, self.layout)
        places = holder_of_chunks(self.size, self.layout)
        return tuple(stacked[rank].narrow(dim, slot * chunk, chunk) for rank, slot in places)

    def chunks_by_rank(self, x: Tensor, dim: int) -> list[list[Tensor]]:
        """Views of a sequence [..., L, ...]: for each rank its chunks, in the order in which it holds them."""
        chunks = x.chunk(self.size * chunks_per_rank(self.size, self.layout), dim)
        return [[chunks[chunk] for chunk in chunks_of_rank(rank, self.size, self.layout)] for rank in range(self.size)]

    def in_position_order(self, stacked: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
        """Segments stacked by rank to one sequence: [S, ..., l, ...] -> [..., L, ...]; ``dim`` is that of l in a
        segment.

        With ``out`` it is written there, in the dtype of ``out``.
        """
        if out is None:
            shape = list(stacked.shape[1:])
            shape[dim] *= self.size
            out = stacked.new_empty(shape)
        chunks = self.chunks_in_order(stacked, dim)
        for part, chunk in zip(out.chunk(len(chunks), dim), chunks):
            part.copy_(chunk)
        return out

    def stacked_by_rank(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`in_position_order`: [..., L, ...] -> contiguous [S, ..., l, ...]."""
        shape = list(x.shape)
        shape[dim] //= self.size
        stacked = x.new_empty((self.size, *shape))
        chunks = self.chunks_in_order(stacked, dim)
        for chunk, part in zip(chunks, x.chunk(len(chunks), dim)):
            chunk.copy_(part)
        return stacked

    def require_group(self) -> dist.ProcessGroup:
        """The process group; raises ``RuntimeError`` where the shard has none."""
        if self.group is None:
            raise RuntimeError(
                f"This SequenceShard (rank {self.rank} of {self.size}) has no process group to communicate over. Take the shard"
                " from `LSSStrategy.sequence_shard`, or pass `group=` when you make one."
            )
        return self.group

    # A process group belongs to its process: copies of a model share it, and a pickled shard arrives without one.
    def __copy__(self) -> SequenceShard:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceShard:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (SequenceShard, (self.rank, self.size, self.layout, None, self.communication_dtype))


WHOLE_SEQUENCE = SequenceShard()
"""The shard of a process that holds its sequences alone: rank 0 of 1."""


class ShardedModule(nn.Module):
    """A module that works on one segment of the sequence and wants to know which.

    :class:`~lightning_lss.LSSStrategy` calls :meth:`set_shard` on every such submodule before training. Subclass it for
    modules of your own; names listed in ``segment_local`` are parameters and buffers of the module that stand for one
    segment only (DESIGN: *segment-local*): their gradients are averaged over the data group instead of the world. The
    names live on the module because attributes of a ``Parameter`` do not survive the start of a spawned process.
    """

    segment_local: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.shard = WHOLE_SEQUENCE

    def set_shard(self, shard: SequenceShard) -> None:
        """Take the shard to work under from now on."""
        self.shard = shard


def segment_modules(root: nn.Module) -> list[ShardedModule]:
    """Every submodule of ``root`` (and ``root`` itself) that takes a shard."""
    return [module for module in root.modules() if isinstance(module, ShardedModule)]


def segment_local_names(root: nn.Module) -> list[str]:
    """Qualified names of all segment-local parameters and buffers below ``root``."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in root.named_modules()
        if isinstance(module, ShardedModule)
        for name in module.segment_local
    ]


def sequence_shard(module: nn.Module) -> SequenceShard:
    """The shard that a LightningModule runs under.

    The trivial shard (rank 0 of 1) under any other strategy, without a trainer, or while no run is under way, so that a
    module written for LSS runs unchanged everywhere.
    """
    if isinstance(module, ShardedModule):
        return module.shard
    trainer = getattr(module, "_trainer", None)
    shard = getattr(getattr(trainer, "strategy", None), "shard_of_run", None)
    return shard if isinstance(shard, SequenceShard) else WHOLE_SEQUENCE


class _Gather(torch.autograd.Function):
    """All-gather of segments in position order, and its adjoint.

    ======== ======================= ==========================================
    forward  x [..., l, ...]         -> [..., L, ...], the same on every rank
    backward grad [..., L, ...]      -> sum over ranks, own segment [..., l, ...]
    ======== ======================= ==========================================
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard, dim: int) -> Tensor:
        ctx.shard, ctx.dim = shard, dim
        return shard.in_position_order(all_gather(x, shard.require_group()).wait(), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        stacked = ctx.shard.stacked_by_rank(grad, ctx.dim)
        return reduce_scatter(stacked, ctx.shard.require_group()).wait(), None, None
