"""Which pairs of queries and keys are visible: the public value ``AttentionMask``."""

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lightning_lss.attention.functions import Function, VisiblePair
from lightning_lss.attention.kinds import (
    Chunked,
    Combined,
    Dense,
    Diagonals,
    Documents,
    Keys,
    Kind,
    Prefix,
    Sizes,
)
from lightning_lss.attention.packing import PackedMask, check_call, keep_functions, no_modes, pack, unpack
from lightning_lss.attention.plan import Plan, plan_segment
from lightning_lss.attention.structure import ChunkWork, chunk_work
from lightning_lss.sequence.batch import BatchMask
from lightning_lss.sequence.layout import check_positive
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard


@dataclass(init=False, repr=False, eq=False)  # without fields: Lightning looks into other objects for the batch size
class AttentionMask(BatchMask):
    """Which pairs of queries and keys are visible, for whole sequences; it means the same on any number of ranks.

    Make one with the class methods, and combine them: ``a & b`` shows what both show, ``a | b`` what either shows. A mask
    is immutable, and its data stays on the CPU. In a batch it is handed to every rank whole. Make it from whole
    sequences: before the batch is split (in the data set, the collate function or ``on_before_batch_transfer``), or in
    a step from entries that ``LSSStrategy(sequence_dims={key: None})`` leaves whole.

    Attributes:
        rows: number of rows of the batch that it tells apart; 1 if it is the same for all.
        heads: the same for query heads.
        num_queries: length of the sequences that it is for; None for any.
        num_keys: the same for keys, which differs only for a memory (cross-attention).
        content_digest: hash of what it shows, for comparisons between ranks.
    """

    def __init__(self, kind: Kind) -> None:
        self.words = pack(kind)  # what attention's operator is given: a compiled graph takes nothing but tensors
        self.kind = kind = unpack(PackedMask(self.words))  # its tensors are views of the words, and nobody else's
        if kind.functions:
            keep_functions(self.words, kind.functions)
        self.rows, self.heads, self.num_queries, self.num_keys = kind.rows, kind.heads, kind.queries, kind.keys

    # -- kinds ---------------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls) -> "AttentionMask":
        """Show everything."""
        return cls(Diagonals())

    @classmethod
    def causal(cls) -> "AttentionMask":
        """Show a query the keys at or before its own position."""
        return cls(Diagonals(low=0))

    @classmethod
    def sliding_window(cls, left: int, right: int = 0) -> "AttentionMask":
        """Show query q the keys from q - ``left`` to q + ``right``, both included.

        A window of n keys in the configuration of a Hugging Face model is ``left=n - 1``. Raises ``ValueError`` for a
        negative number.
        """
        for name, value in (("left", left), ("right", right)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise ValueError(f"{name}={value!r} must be a number of positions, 0 or more.")
        return cls(Diagonals(low=-int(right), high=int(left)))

    @classmethod
    def chunked(cls, size: int) -> "AttentionMask":
        """Show a query the keys in its own block of ``size`` positions (with ``& causal()``, as in Llama 4).

        Raises ``ValueError`` if the size is not a positive integer.
        """
        check_positive(size=size)
        return cls(Chunked(int(size)))

    @classmethod
    def prefix(cls, lengths: Tensor | int) -> "AttentionMask":
        """Show a query the keys at or before its own position, and all before ``lengths``, an integer or int [B].

        It is the prefix language model of T5 (arXiv 1910.10683, section 3.2.1). Raises ``ValueError`` if the lengths are
        not integers of 0 or more.
        """
        lengths = _integers("lengths", torch.as_tensor(lengths).reshape(-1), 1)
        if (lengths < 0).any():
            raise ValueError(f"A prefix has 0 or more positions; got lengths={lengths.tolist()}.")
        return cls(Prefix(lengths))

    @classmethod
    def documents(cls, ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> "AttentionMask":
        """Show a query the keys of its own document (block-diagonal; ``& causal()`` makes it causal).

        Args:
            ids: int [B, L], the number of each token's document; [L] stands for one row. All numbers are alike, also
                negative ones: hide padding with ``& padding(valid)``.
            cu_seqlens: int [n + 1], where the documents of a single row start, and its length: 0, ..., L.

        Raises:
            ValueError: if not exactly one of them is given, or it has another shape, dtype or order.
        """
        if (ids is None) == (cu_seqlens is None):
            raise ValueError("Give either the ids of documents, int [B, L], or cu_seqlens, int [n + 1].")
        if cu_seqlens is not None:
            starts = _integers("cu_seqlens", cu_seqlens, 1)
            lengths = starts.diff()
            if len(starts) < 2 or starts[0] != 0 or (lengths < 0).any():
                raise ValueError(f"cu_seqlens={starts.tolist()} must start at 0 and not decrease.")
            ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
        assert ids is not None
        ids = _integers("ids", ids[None] if ids.dim() == 1 else ids, 2)
        return cls(Documents(ids.unique(return_inverse=True)[1].int()))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> "AttentionMask":
        """Show a query the keys of its own document, where a document starts wherever positions, int [B, L] or [L], do
        not go on by 1.

        Raises ``ValueError`` for another shape or dtype.
        """
        positions = _integers("position_ids", position_ids[None] if position_ids.dim() == 1 else position_ids, 2)
        starts = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        return cls(Documents(starts.cumsum(1).int()))

    @classmethod
    def padding(cls, valid: Tensor) -> "AttentionMask":
        """Hide the keys that are not ``valid``, bool or 0/1 [B, L], and show the queries there nothing: their rows are 0.

        Padding may be anywhere. Raises ``ValueError`` for another shape or other values.
        """
        return cls(Documents(_booleans(valid).int() - 1))

    @classmethod
    def key_padding(cls, valid: Tensor) -> "AttentionMask":
        """Hide the keys that are not ``valid``, bool or 0/1 [B, M], such as the padding of a memory (cross-attention).

        Raises ``ValueError`` for another shape or other values.
        """
        return cls(Keys(_booleans(valid)))

    @classmethod
    def from_dense(cls, visible: Tensor) -> "AttentionMask":
        """Show the pairs that are true in ``visible``, bool [B or 1, H or 1, L, L] (for a memory [..., L, M]).

        It costs its own size on every rank. Raises ``ValueError`` for another shape or dtype.
        """
        if visible.dim() != 4 or visible.dtype != torch.bool:
            raise ValueError(
                f"A dense mask is bool [B or 1, H or 1, L, L]; got {visible.dtype} {tuple(visible.shape)}."
                " Where it is added to scores, pass the pairs that are not -inf."
            )
        return cls(Dense(visible.detach().cpu()))

    @classmethod
    def from_function(cls, visible: VisiblePair) -> "AttentionMask":
        """Show the pairs for which ``visible(b, h, q, k)`` is true: a row of the batch, a query head, the global
        positions of a query and a key, each an int64 scalar, as for FlexAttention's ``mask_mod``.

        It is evaluated for every pair, a few times a batch, under ``torch.vmap`` and on the CPU; tensors that it reads must
        be there. A mask made of the kinds above costs far less. A mask is a value: where something that the function reads
        changes, make a new one. Attention, forward and backward, compares the content of all that is read with what it was.

        Raises:
            ValueError: if the function fails under ``torch.vmap``, does not return one bool (or 0 and 1), or reads
                something whose content cannot be known; and where the mask is used, if what is read has changed.
        """
        return cls(Function(visible))

    def __and__(self, other: "AttentionMask") -> "AttentionMask":
        return self._combine(other, both=True)

    def __or__(self, other: "AttentionMask") -> "AttentionMask":
        return self._combine(other, both=False)

    def _combine(self, other: Any, both: bool) -> "AttentionMask":
        if not isinstance(other, AttentionMask):
            return NotImplemented
        for name in ("rows", "heads", "num_queries", "num_keys"):
            own, its = getattr(self, name), getattr(other, name)
            anything = 1 if name in ("rows", "heads") else None
            if own != its and anything not in (own, its):
                raise ValueError(f"{self} and {other} cannot be combined: {name} is {own} and {its}.")
        return AttentionMask(Combined(self.kind, other.kind, both))

    # -- what it shows -------------------------------------------------------------------------------------------------

    def dense(
        self, length: int, *, num_keys: int | None = None, batch: int | None = None, heads: int | None = None
    ) -> Tensor:
        """Every pair of a sequence of ``length`` L, bool [B or 1, H or 1, L, L]: what the mask is by definition.

        ``num_keys`` is the length of a memory. ``batch`` and ``heads`` are needed only for a function that looks at them.
        Raises ``ValueError`` if the mask is not for such sequences, or what its functions read has changed.
        """
        sizes = Sizes(batch or self.rows, heads or self.heads, length, length if num_keys is None else num_keys)
        check_call(self.packed, sizes)
        visible = self.kind.visible(torch.arange(length), sizes)
        return visible.clone(memory_format=torch.contiguous_format)  # not a view of the mask's own data

    def select(self, positions: Tensor) -> "AttentionMask":
        """The mask of the sequence that consists of ``positions``, int64 [n], of this one.

        Diagonals count in the new sequence: a causal mask stays one. Raises ``ValueError`` if positions descend.
        """
        if (positions.diff() < 0).any():
            raise ValueError(
                f"positions={positions.tolist()} must ascend, since diagonals and prefixes have an order: sort them."
            )
        return AttentionMask(self.kind.select(positions.cpu()))

    def check(self, sizes: Sizes) -> None:
        """Raise ``ValueError`` if the mask is not for such sequences."""
        self.kind.check_sizes(sizes)

    def chunk_work(
        self, length: int, num_chunks: int, *, batch: int | None = None, heads: int | None = None
    ) -> ChunkWork:
        """What the queries of each of ``num_chunks`` equal chunks of sequences of ``length`` look at.

        The pairs are those of one head, summed over the rows of the batch, for all of which a mask of one row stands.
        ``batch`` and ``heads`` as in :meth:`dense`; without them a function that looks at them is counted by the first.
        Raises ``ValueError`` if the mask is not for such sequences.
        """
        sizes = Sizes(batch or self.rows, heads or self.heads, length, length)
        check_call(self.packed, sizes)
        work = chunk_work(self.packed, sizes, num_chunks)
        return work._replace(pairs=work.pairs * (sizes.batch // self.kind.told_apart(sizes).batch))

    def visible_pairs(
        self, length: int, num_chunks: int = 1, *, batch: int | None = None, heads: int | None = None
    ) -> float:
        """Number of pairs that are visible in a sequence of ``length``, mean of the rows of the batch; a mask without
        structure is counted in blocks, of which a pair is computed for all heads. ``batch`` and ``heads`` as in
        :meth:`chunk_work`. With the ``num_chunks`` of the layout it is not looked at again."""
        pairs = self.chunk_work(length, num_chunks, batch=batch, heads=heads).pairs
        return float(pairs.sum() / (batch or self.rows))

    def plan(self, length: int, shard: SequenceShard = WHOLE_SEQUENCE) -> Plan:
        """What the rank of ``shard`` computes and fetches in self-attention of sequences of ``length`` L, without padding.

        Raises ``ValueError`` if the mask is not for such sequences, or L and the padding of ``shard`` cannot be divided evenly.
        """
        check_call(self.packed, Sizes(self.rows, self.heads, length, length))
        packed = with_padding(self.packed, length, shard.padding).packed if shard.padding else self.packed
        return plan_segment(packed, length + shard.padding, shard, self.rows, self.heads)

    @property
    def packed(self) -> PackedMask:
        """The mask as plans are made from it."""
        return PackedMask(self.words)

    @property
    def content_digest(self) -> int:
        """Hash of what the mask shows, 63 bits; of a function it takes the code, and the content of all that it reads."""
        words = pack(self.kind, by_content=True) if self.kind.functions else self.words
        return int.from_bytes(words[:8].numpy().tobytes(), "big") >> 1

    @property
    def digest(self) -> bytes:
        """Hash of the mask within this process: another function is another mask."""
        return self.packed.digest

    # -- a value -------------------------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> "AttentionMask":
        """Return the mask itself: plans are made from it on the CPU."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionMask) and self.packed == other.packed

    def __hash__(self) -> int:
        return hash(self.packed)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> "AttentionMask":
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionMask, (self.kind,)

    def __repr__(self) -> str:
        return f"AttentionMask({self.kind})"


# -- checks ------------------------------------------------------------------------------------------------------------


def _integers(name: str, x: Tensor, dims: int) -> Tensor:
    if x.dim() != dims or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        shape = {1: "[n]", 2: "[B, L]"}[dims]
        raise ValueError(f"{name} must be integers {shape}; got {x.dtype} {tuple(x.shape)}.")
    return x.detach().to("cpu", torch.int64)


def _booleans(valid: Tensor) -> Tensor:
    if valid.dim() != 2 or not ((valid == 0) | (valid == 1)).all():
        raise ValueError(f"valid must be bool, or 0 and 1, [B, L]; got {valid.dtype} {tuple(valid.shape)}.")
    return valid.detach().to("cpu", torch.bool)


@lru_cache(maxsize=8)  # layers share masks, and so do their forward and backward passes
@no_modes()
def with_padding(mask: PackedMask, length: int, padding: int) -> AttentionMask:
    """Return the mask of sequences of ``length`` that are followed by ``padding`` positions, whose keys nobody sees."""
    positions = torch.arange(length + padding)
    extended = AttentionMask(unpack(mask)).select(positions.clamp(max=length - 1))
    return extended & AttentionMask.key_padding((positions < length)[None])
