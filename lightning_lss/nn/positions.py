"""Learned positions for a split sequence: each rank keeps its own rows of the table."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, ShardedModule

_BLOCK = 256  # rows that are drawn from one generator


@dataclass(frozen=True)
class InitialRows:
    """Initial values of the rows of a positional table at some runs of positions, normal with ``std``.

    Each block of rows has its own generator, seeded by the block's position in the table. A position's row is therefore
    the same for every number of ranks and layout, and a rank draws only the blocks that overlap its rows.
    """

    runs: tuple[range, ...]
    dim: int
    std: float
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, dim]."""
        return sum(map(len, self.runs)), self.dim

    def draw(self) -> Tensor:
        """Draw the rows, float32 [rows, dim]."""
        rows = torch.empty(self.shape, device="cpu", dtype=torch.float32)
        for run, own in zip(self.runs, rows.split([len(run) for run in self.runs])):
            for block in range(run.start // _BLOCK, (run.stop - 1) // _BLOCK + 1):
                generator = torch.Generator("cpu").manual_seed((self.seed + block * 0x9E3779B97F4A7C15) % 2**63)
                drawn = torch.randn(_BLOCK, self.dim, generator=generator, device="cpu", dtype=torch.float32)
                first, last = max(run.start, block * _BLOCK), min(run.stop, (block + 1) * _BLOCK)
                own[first - run.start : last - run.start] = drawn[first - block * _BLOCK : last - block * _BLOCK]
        return rows.mul_(self.std)


class DeferredTable(nn.Parameter):
    """A positional table that is built on first access and is an ordinary ``Parameter`` from then on.

    A model is made before its rank is known. If the table were built at once and cut later, each rank would hold all of
    it for a moment. Under LSS the strategy sets the shard first, and only this rank's rows are built. Any other access
    to the parameter (its shape, an optimizer's step, a state dict) builds the whole table. (Compare
    ``torch.nn.UninitializedParameter``, which raises.)
    """

    rows: InitialRows

    # Attributes that can be read without building the rows.
    _METADATA = frozenset(
        getattr(torch.Tensor, name).__get__
        for name in ("device", "dtype", "grad", "grad_fn", "is_leaf", "is_meta", "is_sparse", "layout", "requires_grad")
    )

    def __new__(
        cls, rows: InitialRows, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "DeferredTable":
        table = torch.Tensor._make_subclass(cls, torch.empty(0, device=device, dtype=dtype), True)
        table.rows = rows
        return table

    def build(self) -> None:
        """Fill in the rows and become an ordinary parameter; the object keeps its identity."""
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad(), torch.inference_mode(False):
            self.data = self.rows.draw().to(self.device, self.dtype)
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls._METADATA:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, DeferredTable):
                    leaf.build()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeferredTable":
        memo[id(self)] = copy = DeferredTable(self.rows, self.device, self.dtype)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:  # a spawned process builds the rows itself
        return (DeferredTable, (self.rows, self.device, self.dtype))


class SegmentPositionalEmbedding(ShardedModule):
    """A learned absolute positional table; each rank keeps only its segment's rows (LSS Transformer, arXiv 2311.02382).

    Its weight is segment-local: each rank learns the embedding of its own positions, and gradients are averaged only
    over the ranks that hold the same segment. Checkpoints hold one table [num_positions, dim] in position order.

    Args:
        num_positions: number of positions; with more than one rank, the global sequence length.
        dim: width E; ``ValueError`` if either size is not positive.
        std: standard deviation of the normal initialization (GPT-2's 0.02).
    """

    segment_local = ("weight",)

    def __init__(self, num_positions: int, dim: int, std: float = 0.02) -> None:
        super().__init__()
        if num_positions < 1 or dim < 1:
            raise ValueError(f"num_positions={num_positions} and dim={dim} must be positive.")
        self.num_positions, self.dim, self.std = num_positions, dim, std
        # one draw from the default generator for every size, so that the size does not change later initializations
        self.seed = int(torch.randint(2**62, (), device="cpu").item())
        self.weight: nn.Parameter = DeferredTable(self._initial_rows())

    def set_shard(self, shard: SequenceShard) -> None:
        """Keep only the rows of ``shard``.

        Raises ``ValueError`` if ``num_positions`` cannot be divided evenly, ``RuntimeError`` if the table has been cut
        to another segment already.
        """
        differs = shard.ranges(self.num_positions) != self.row_ranges()  # before anything changes: it may raise
        if differs and self.shard.size > 1:
            raise RuntimeError(
                f"This table holds the rows of segment {self.shard.rank} of {self.shard.size} ({self.shard.layout}) and cannot"
                f" serve segment {shard.rank} of {shard.size} ({shard.layout}): the other rows are on other ranks. Make a new"
                " model, or load one from a checkpoint."
            )
        super().set_shard(replace(shard, padding=0, is_current=None))  # rows are those of all batches
        if isinstance(self.weight, DeferredTable):  # as is_deferred, but for type checkers
            self.weight.rows = self._initial_rows()
            self.weight.build()
        elif differs:
            self.weight.data, self.weight.grad = self.own_rows(self.weight.data), None

    @property
    def is_deferred(self) -> bool:
        """Whether the table has not been accessed yet."""
        return isinstance(self.weight, DeferredTable)

    def reset_parameters(self) -> None:
        """Set this rank's rows to their initial values, which depend on ``seed`` and the position alone."""
        with torch.no_grad():
            self.weight.copy_(self._initial_rows().draw())

    @torch.no_grad()
    def take_rows(self, start: int, rows: Tensor) -> None:
        """Copy this rank's rows from ``rows`` [n, dim], the rows ``[start, start + n)`` of the whole table."""
        index = self.shard.positions(self.weight.size(0), device=rows.device) - start
        ours = (index >= 0) & (index < rows.size(0))
        self.weight[ours.to(self.weight.device)] = rows[index[ours]].to(self.weight)

    def become_whole(self) -> None:
        """Gather the rows of all segments, as before a run; every rank of the sequence group must call it."""
        self.weight.data, self.weight.grad = self.shard.gather(self.weight.detach(), dim=0), None
        super().set_shard(WHOLE_SEQUENCE)

    def forward(self, local_length: int) -> Tensor:
        """Return the rows of the local positions, [l, dim]; raise ``ValueError`` if they do not fit the table."""
        length, size = local_length * self.shard.size, self.shard.size
        if length != self.num_positions and not (size == 1 and 0 < length < self.num_positions):
            spread = f" ({local_length} on each of {size} ranks)" if size > 1 else ""
            raise ValueError(
                f"A sequence of length {length}{spread} does not fit a learned table of {self.num_positions} positions: it takes"
                f" {'exactly' if size > 1 else 'at most'} that many. Use sequences of that length, set num_positions to the length"
                " of yours, or use RotaryEmbedding (positions='rotary'), which takes any length."
            )
        # a copy, since torch's module tracker (FLOPs in the model summary) cannot follow a view of a parameter
        return self.weight[:local_length].clone()

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.num_positions}, {self.dim}"

    def _initial_rows(self) -> InitialRows:
        return InitialRows(self.row_ranges(), self.dim, self.std, self.seed)

    def row_ranges(self) -> tuple[range, ...]:
        """The positions whose rows this rank holds, in the order of the rows."""
        return self.shard.ranges(self.num_positions)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        table = state_dict.get(key)
        if self.shard.size > 1 and isinstance(table, Tensor) and table.size(0) == self.num_positions:
            state_dict[key] = self.own_rows(table)  # load_state_dict works on a copy of the caller's dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    def own_rows(self, table: Tensor) -> Tensor:
        """Cut a whole table [num_positions, ...] to this rank's rows."""
        return torch.cat([table[run.start : run.stop] for run in self.row_ranges()])
