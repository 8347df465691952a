"""A rank's place in its sequence group, ``SequenceShard``, and the modules that depend on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss.sequence import borders
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.layout import check_layout, check_length, chunks_of_ranks, position_ranges


@dataclass(frozen=True)
class SequenceShard:
    """A rank's place in its sequence group.

    Args:
        rank: index of the segment, in ``[0, size)``.
        size: number of ranks S that share one sequence.
        layout: which positions a rank holds, ``contiguous``, ``zigzag`` or ``balanced`` (see
            :mod:`lightning_lss.sequence.layout`).
        group: process group of the S ranks, in segment order; :meth:`gather` and attention need it.
        communication_dtype: dtype in which keys, values and their gradients are sent between the ranks, such as
            ``torch.bfloat16``; None for the one that they are computed in.
        assignment: with ``layout="balanced"``, which chunks of the batch at hand each rank holds. Without one, whoever
            asks for positions gets a ``RuntimeError``.
        padding: how many positions at the end of the batch at hand fill its sequences up to a length that can be divided. What
            is gathered, summed, averaged or taken of the whole sequence is without them, and attention hides their keys.
        is_current: says whether this shard is that of the batch at hand, where each batch has its own; None for always.
            Where it is not, whoever asks for positions, splits or gathers gets a ``RuntimeError``.

    Raises:
        ValueError: if ``rank`` is not in ``[0, size)``, the layout is unknown, the assignment is not for this layout
            and size, or the padding is negative, or not 0 where ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    layout: str = "zigzag"
    group: dist.ProcessGroup | None = None
    communication_dtype: torch.dtype | None = None
    assignment: ChunkAssignment | None = None
    padding: int = 0
    is_current: Callable[["SequenceShard"], bool] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_layout(self.layout)
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank={self.rank} is out of range for a sequence group of size={self.size}: use 0 to {self.size - 1}."
            )
        if self.assignment is not None and (self.layout != "balanced" or self.assignment.size != self.size):
            raise ValueError(
                f"An assignment of chunks to {self.assignment.size} ranks does not fit layout={self.layout!r} and size={self.size}:"
                " use layout='balanced' and an assignment to as many ranks."
            )
        if self.padding < 0 or (self.padding and self.size == 1):
            raise ValueError(
                f"padding={self.padding} must be a number of positions, and 0 where size={self.size} does not split sequences."
            )

    @property
    def held_chunks(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the chunks that each rank holds, in its local order."""
        return chunks_of_ranks(self.size, self.layout, self.assignment)

    @property
    def num_chunks(self) -> int:
        """Number of equal runs of positions that the whole sequence is divided into."""
        return self.size * len(self.held_chunks[0])

    def check_current(self) -> None:
        """Raise ``RuntimeError`` if this shard is not that of the batch at hand; compiled code does not ask."""
        if torch.compiler.is_compiling() or self.is_current is None or self.is_current(self):
            return
        raise RuntimeError(
            "This SequenceShard is of an earlier batch: layout='balanced' gives each batch its own positions, and pad_values its own"
            " padding. Ask sequence_shard(module) within the step, or use layout='zigzag' and sequences of one length."
        )

    def check_length(self, length: int) -> None:
        """Raise ``ValueError`` if ``length`` positions cannot be divided evenly."""
        check_length(length, self.size, self.layout, self.assignment)

    def local_length(self, length: int) -> int:
        """Positions per rank, L / S; raises ``ValueError`` if ``length`` cannot be divided evenly."""
        self.check_length(length)
        return length // self.size

    def ranges(self, length: int, rank: int | None = None) -> tuple[range, ...]:
        """The runs of global positions that the rank, or another one, holds, in local order; raises as
        :meth:`local_length`."""
        self.check_current()
        rank = self.rank if rank is None else rank
        return position_ranges(length, rank, self.size, self.layout, self.assignment)

    def positions(self, local_length: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the local tokens, int64 [l]; padding is at the last position of the sequence.

        Raises ``ValueError`` if l cannot be divided into chunks.
        """
        places = self.places(local_length, device)
        return places.clamp(max=self.true_length(local_length) - 1) if self.padding else places

    def valid(self, local_length: int, device: torch.device | str | None = None) -> Tensor:
        """Which of the local tokens are of the sequence, and no padding at its end, bool [l]; raises as :meth:`positions`."""
        return self.places(local_length, device) < self.true_length(local_length)

    def true_length(self, local_length: int) -> int:
        """Length of the sequence of which each rank holds ``local_length`` positions, without the padding at its end."""
        return local_length * self.size - self.padding

    def places(self, local_length: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the local tokens, int64 [l], where padding goes on counting; raises as :meth:`positions`."""
        self.check_current()
        if self.assignment is None:
            runs = self.ranges(local_length * self.size)
            return torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])
        starts = self.assignment.tensor[self.rank]  # tensors alone: compiled code serves every assignment
        chunk = local_length // starts.size(0)
        if chunk == 0 or local_length % starts.size(0):
            self.check_length(local_length * self.size)
        return (starts.unsqueeze(1) * chunk + torch.arange(chunk)).flatten().to(device)

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """Cut ``x`` to this rank's segment along ``dim``: [..., L, ...] -> [..., l, ...], contiguous where S > 1.

        Where the batch at hand is padded, so is ``x``, with its last position, unless it is already. Differentiable; the
        gradient reaches only the rank's own segment. Raises ``ValueError`` if L cannot be divided evenly.
        """
        if self.size == 1:
            return x
        if self.padding and x.size(dim) % self.num_chunks:
            x = borders.padded(x, self.padding, dim)
        parts = [x.narrow(dim, run.start, len(run)) for run in self.ranges(x.size(dim))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).contiguous()

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """Gather the whole sequence in its original order on every rank, without padding: [..., l, ...] -> [..., L, ...].

        Differentiable. The adjoint is exact: a reduce-scatter sums the gradients of the gathered tensor over the ranks,
        and each rank receives those of its own segment. (Slicing the local gradient would lose the contributions of
        other ranks' losses.) Raises ``RuntimeError`` if S > 1 and there is no process group, or the shard is of an
        earlier batch; ``ValueError`` if no sequence can be divided into segments of length l.
        """
        return borders.gather(x, self, dim)

    def on_whole(self, function: Callable[[Tensor], Any], x: Tensor, dim: int = 1) -> Any:
        """Apply ``function`` to the whole sequence on every rank and keep this rank's segment of what it returns.

        For what cannot be computed on segments, such as ``nn.LSTM``: ``y, state = shard.on_whole(self.lstm, x)``. The price
        is that of one device: every rank gathers the whole sequence, computes all of it and keeps its activations for the
        backward pass.

        Args:
            function: maps [..., L, ...] to a tensor that has the sequence along ``dim`` too, or to a tuple that starts with
                one. All else in the tuple is returned as it is, the same on every rank.
            x: [..., l, ...], this rank's segment.
            dim: of the sequence.

        Raises:
            ValueError: if no sequence can be divided into segments of length l, or the result has another length.
        """
        if self.size == 1:
            return function(x)
        result = function(self.gather(x, dim))
        whole, *more = result if isinstance(result, tuple) else (result,)
        length = self.true_length(x.size(dim))
        if not isinstance(whole, Tensor) or not -whole.dim() <= dim < whole.dim() or whole.size(dim) != length:
            found = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise ValueError(
                f"on_whole needs a function whose result, or the first one in a tuple, has the {length} positions of the sequence"
                f" in dimension {dim}; got {found}. For another result write function(shard.gather(x, dim))."
            )
        segment = self.split(whole, dim)
        return (segment, *more) if isinstance(result, tuple) else segment

    # Of the following, each has the exact adjoint, and every rank of the sequence group must call it. What they return of
    # the whole sequence is the same on every rank, and so is a loss of it, as it should be: the losses of ranks are averaged.
    # They raise as gather does.

    def shift(self, x: Tensor, offset: int, dim: int = 1, fill: float = 0) -> Tensor:
        """Move the sequence by ``offset`` positions: [..., l, ...] -> [..., l, ...], of any dtype.

        Position p of the result is position p + ``offset`` of ``x``, or ``fill`` where the sequence has none. With 1 each
        token sees the next one, with -1 the one before it: ``labels = shard.shift(tokens, 1, fill=-100)``. A few positions
        are sent; the whole sequence is, where ``offset`` is longer than a chunk.
        """
        return borders.shift(x, offset, self, dim, fill)

    def sum(self, x: Tensor, dim: int = 1) -> Tensor:
        """Sum over the whole sequence: [..., l, ...] -> [..., ...]; integers become int64."""
        return borders.sum_over_sequence(x, self, dim)

    def mean(self, x: Tensor, dim: int = 1) -> Tensor:
        """Average over the whole sequence: [..., l, ...] -> [..., ...]. ``x`` is floating-point or complex.

        Of the tokens [B, l, E] that are ``valid``, bool [B, l], write
        ``shard.sum(x * valid[..., None]) / shard.sum(valid)[:, None]``.
        """
        return borders.mean_over_sequence(x, self, dim)

    def first(self, x: Tensor, dim: int = 1, valid: Tensor | None = None) -> Tensor:
        """Take the first position of the whole sequence, such as a class token: [..., l, ...] -> [..., ...].

        With ``valid``, bool [B, l], it is the first valid one of each row of dimension 0, for sequences that are padded on
        the left; 0 for a row that has none. Raises ``ValueError`` if ``valid`` does not fit ``x``.
        """
        return borders.take_end(x, self, dim, last=False, valid=valid)

    def last(self, x: Tensor, dim: int = 1, valid: Tensor | None = None) -> Tensor:
        """Take the last position of the whole sequence, or the last valid one of each row, as :meth:`first`."""
        return borders.take_end(x, self, dim, last=True, valid=valid)

    def chunks_in_order(self, segments: Tensor, dim: int) -> list[Tensor]:
        """View segments stacked by rank, [S, ..., l, ...], as chunks in position order; ``dim`` is l's in a segment."""
        chunks = dict[int, Tensor]()
        for held, segment in zip(self.held_chunks, segments):
            chunks.update(zip(held, segment.chunk(len(held), dim)))
        return [chunks[index] for index in range(len(chunks))]

    def chunks_by_rank(self, x: Tensor, dim: int) -> list[list[Tensor]]:
        """View a sequence [..., L, ...] as the chunks of each rank, in the rank's local order."""
        chunks = x.chunk(self.num_chunks, dim)
        return [[chunks[index] for index in held] for held in self.held_chunks]

    def require_group(self) -> dist.ProcessGroup:
        """Return the process group; raise ``RuntimeError`` if there is none."""
        if self.group is None:
            raise RuntimeError(
                f"This SequenceShard (rank {self.rank} of {self.size}) has no process group to communicate over. Take the shard"
                " from `LSSStrategy.sequence_shard`, or pass `group=` when you make one."
            )
        return self.group

    # A process group and the batch at hand belong to their process: copies of a model share them, and a pickled shard
    # arrives without.
    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "SequenceShard":
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self.rank, self.size, self.layout, None, self.communication_dtype, self.assignment, self.padding)
        return (SequenceShard, place)


WHOLE_SEQUENCE = SequenceShard()
"""The shard of a process that holds whole sequences: rank 0 of 1."""


class ShardedModule(nn.Module):
    """A module whose computation depends on the segment of the sequence that it works on.

    :class:`~lightning_lss.LSSStrategy` calls :meth:`set_shard` on every such submodule before training. Subclass it for
    modules of your own. ``segment_local`` lists the names of the module's *segment-local* parameters and buffers: they
    stand for one segment only, and their gradients are averaged over the data group instead of the world. (Names are kept
    here since attributes of a ``Parameter`` do not survive the start of a spawned process.)
    """

    segment_local: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.shard = WHOLE_SEQUENCE

    def set_shard(self, shard: SequenceShard) -> None:
        """Work on the segment of ``shard`` from now on."""
        self.shard = shard


def segment_modules(root: nn.Module) -> list[ShardedModule]:
    """Every :class:`ShardedModule` among ``root`` and its submodules."""
    return [module for module in root.modules() if isinstance(module, ShardedModule)]


def segment_local_names(root: nn.Module) -> list[str]:
    """Qualified names of all segment-local parameters and buffers of ``root``."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in root.named_modules()
        if isinstance(module, ShardedModule)
        for name in module.segment_local
    ]


def sequence_shard(module: nn.Module) -> SequenceShard:
    """Return the shard that a LightningModule, or a :class:`ShardedModule`, runs under.

    Under any other strategy, without a trainer and outside of a run it is the trivial shard (rank 0 of 1), so a module
    written for LSS runs unchanged everywhere; and under :class:`~lightning_lss.LSSStrategy` where it shows the module
    whole sequences.
    """
    return module.shard if isinstance(module, ShardedModule) else _of_strategy(module, "shard_of_module")


def place_of(module: nn.Module) -> SequenceShard:
    """Return this process's place in its sequence group in a run of a LightningModule, whatever the module is shown."""
    return _of_strategy(module, "shard_of_run")


def _of_strategy(module: nn.Module, name: str) -> SequenceShard:
    strategy = getattr(getattr(module, "_trainer", None), "strategy", None)
    shard = getattr(strategy, name, None)
    return shard if isinstance(shard, SequenceShard) else WHOLE_SEQUENCE
