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
    """All options of one call of attention; for their meaning see :func:`lss_attention`.

    To add an option, add a field here and an entry to the operator's schema (:mod:`lightning_lss.attention.operator`).
    """

    shard: SequenceShard
    causal: bool
    scale: float
    kernel_name: str = "auto"  # inductor calls a parameter of its own ``kernel``
    head_chunks: int | None = None
    keep_gathered: bool = False

    def resolve(self, q: Tensor, k: Tensor) -> "AttentionSpec":
        """Choose the kernel and the number of head chunks for ``q`` [B, H, l, D] and ``k`` [B, G, l, D] where the spec
        leaves them open; raise ``ValueError`` if it names a kernel that cannot take them."""
        heads, head_chunks = k.size(1), self.head_chunks
        if head_chunks is None:
            most = 1 if self.keep_gathered else min(_MOST_HEAD_CHUNKS, max(1, 2 * k.nbytes // _LEAST_BYTES))
            head_chunks = max(n for n in range(1, most + 1) if heads % n == 0)
        return replace(self, kernel_name=select_kernel(q, self.kernel_name).name, head_chunks=head_chunks)

    def tiles(self, local_length: int) -> tuple[Tile, ...]:
        """Tiles that this rank computes; the spec must be resolved."""
        rank, size, layout = self.shard.rank, self.shard.size, self.shard.layout
        offset_diagonal = "offset_diagonal" in KERNELS[self.kernel_name].takes
        return attention_tiles(local_length * size, rank, size, layout, self.causal, offset_diagonal)

    def split_heads(self, heads: int) -> list[slice]:
        """Slice ``heads`` heads, of queries or keys, by the head chunk that they belong to, with a resolved spec."""
        assert self.head_chunks is not None
        step = heads // self.head_chunks
        return [slice(first, first + step) for first in range(0, heads, step)]


def check_head_chunks(head_chunks: object, heads: int, keep_gathered: bool) -> None:
    """Raise ``ValueError`` unless ``heads`` key/value heads can be gathered in ``head_chunks`` parts, or ``"auto"``."""
    if head_chunks == "auto":
        return
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, int) or head_chunks < 1 or heads % head_chunks:
        raise ValueError(f"head_chunks={head_chunks!r} must be 'auto' or a divisor of the {heads} key/value heads.")
    if keep_gathered and head_chunks != 1:
        raise ValueError(
            f"keep_gathered=True gathers all heads at once, so head_chunks={head_chunks} has no effect: leave it at 'auto', or"
            " set keep_gathered=False to gather in head chunks."
        )
