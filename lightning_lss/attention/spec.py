"""Everything about one call of attention that is not a tensor."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, select_kernel
from lightning_lss.attention.tiles import Tile, attention_tiles
from lightning_lss.sequence.segment import SequenceShard

HeadChunks = int | Literal["auto"]

# Small head chunks hide more of the first gather and stay in the cache, but small messages waste the network.
_MOST_HEAD_CHUNKS = 8
_LEAST_BYTES = 2**20  # of keys and values that a rank sends at a time


@dataclass(frozen=True)
class AttentionSpec:
    """All options of one call of attention.

    To add an option, add a field here and an entry to the operator's schema (:mod:`lightning_lss.attention.operator`).

    Args:
        shard: the rank's place in its sequence group.
        causal: whether a query sees only keys at or before its own position.
        scale: factor on the scores.
        kernel_name: one of :data:`lightning_lss.attention.kernels.KERNELS`, or ``"auto"``. (Inductor calls a parameter of
            its own ``kernel``.)
        head_chunks: number of parts in which the key/value heads are gathered; None: see :func:`choose_head_chunks`.
        keep_gathered: whether gathered keys and values are kept for the backward pass, those of all heads at once.
    """

    shard: SequenceShard
    causal: bool
    scale: float
    kernel_name: str = "auto"
    head_chunks: int | None = None
    keep_gathered: bool = False

    def resolve(self, q: Tensor, k: Tensor) -> "AttentionSpec":
        """Choose the kernel and the number of head chunks for ``q`` [B, H, l, D] and ``k`` [B, G, l, D] where the spec
        leaves them open.

        Raises:
            ValueError: if the kernel cannot take ``q``, or the head chunks do not divide the heads of ``k``.
        """
        head_chunks = self.head_chunks
        if head_chunks is None:
            head_chunks = choose_head_chunks(k.size(1), 2 * k.nbytes, self.keep_gathered)
        check_head_chunks(head_chunks, k.size(1), self.keep_gathered)
        return replace(self, kernel_name=select_kernel(q, self.kernel_name).name, head_chunks=head_chunks)

    def tiles(self, local_length: int) -> tuple[Tile, ...]:
        """Tiles that this rank computes; the spec must be resolved."""
        rank, size, layout = self.shard.rank, self.shard.size, self.shard.layout
        offset_diagonal = KERNELS[self.kernel_name].offset_diagonal
        return attention_tiles(local_length * size, rank, size, layout, self.causal, offset_diagonal)

    def split_heads(self, heads: int) -> list[slice]:
        """Slice ``heads`` heads, of queries or keys, by the head chunk that they belong to, with a resolved spec."""
        assert self.head_chunks is not None
        step = heads // self.head_chunks
        return [slice(first, first + step) for first in range(0, heads, step)]


def check_head_chunks(head_chunks: object, heads: int, keep_gathered: bool) -> None:
    """Raise ``ValueError`` unless ``heads`` key/value heads can be gathered in ``head_chunks`` parts."""
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, int) or head_chunks < 1 or heads % head_chunks:
        raise ValueError(f"head_chunks={head_chunks!r} must be 'auto' or a divisor of the {heads} key/value heads.")
    if keep_gathered and head_chunks != 1:
        raise ValueError(
            f"keep_gathered=True gathers all heads at once, so head_chunks={head_chunks} has no effect: leave it at 'auto', or"
            " set keep_gathered=False to gather in head chunks."
        )


def choose_head_chunks(heads: int, sent: int, keep_gathered: bool) -> int:
    """Choose the number of parts in which to gather ``heads`` key/value heads; a rank sends ``sent`` bytes in all."""
    most = 1 if keep_gathered else min(_MOST_HEAD_CHUNKS, int(sent) // _LEAST_BYTES)
    return max(n for n in range(1, max(1, most) + 1) if heads % n == 0)
