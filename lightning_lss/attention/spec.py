"""Everything about one call of attention but queries, keys and values."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, select_kernel
from lightning_lss.attention.kinds import Diagonals, Sizes
from lightning_lss.attention.masks import with_padding
from lightning_lss.attention.packing import PackedMask, check_call, pack
from lightning_lss.attention.plan import Call, Plan, features_of, plan_call
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard

HeadChunks = int | Literal["auto"]

# Small head chunks hide more of the first gather and stay in the cache, but small messages waste the network.
_MOST_HEAD_CHUNKS = 8
_LEAST_BYTES = 2**20  # of keys and values that a rank sends at a time

_CAUSAL, _FULL = PackedMask(pack(Diagonals(low=0))), PackedMask(pack(Diagonals()))


class Modifiers(NamedTuple):
    """Tensors that change scores, other than queries and keys; for their meaning see :func:`lss_attention`."""

    sinks: Tensor | None = None  # [H]
    mask: Tensor | None = None  # the words of a mask, uint8, on the CPU
    assignment: Tensor | None = None  # the chunks of each rank, int64 [S, n], on the CPU
    bias: Tensor | None = None  # [B or 1, H or 1, L, M]
    slopes: Tensor | None = None  # [H]
    seed: Tensor | None = None  # of dropout, int64 [], on the CPU


@dataclass(frozen=True)
class AttentionSpec:
    """All options of one call of attention; for their meaning see :func:`lss_attention`.

    To add an option, add a field here and an entry to the operator's schema (:mod:`lightning_lss.attention.operator`).
    """

    shard: SequenceShard
    causal: bool
    scale: float
    kernel_name: str = "auto"  # inductor calls a parameter of its own ``kernel``
    masked_kernel_name: str = "auto"  # for tiles that the kernel does not take
    head_chunks: int | None = None
    keep_gathered: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    whole_memory: bool = False

    def plan(self, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers) -> tuple["AttentionSpec", Plan]:
        """Choose the kernels and the number of head chunks for ``q`` [B, H, l, D], ``k`` [B, G, m, D] and ``v`` [B, G,
        m, Dv] where the spec leaves them open, and plan what this rank does.

        Raises ``ValueError`` if the spec names a kernel that cannot take what is asked, the lengths cannot be divided
        evenly, or the mask is for other sequences or reads something that has changed.
        """
        mask = PackedMask(modifiers.mask) if modifiers.mask is not None else _CAUSAL if self.causal else _FULL
        call = self._call(q, k)
        padding, more_keys = self.shard.padding, self.key_shard.padding
        sizes = call.sizes._replace(queries=call.sizes.queries - padding, keys=call.sizes.keys - more_keys)
        if modifiers.mask is not None:
            check_call(mask, sizes)
        if more_keys and mask != _CAUSAL:  # a causal query sees no padding, which is at the end
            mask = with_padding(mask, sizes.queries, padding).packed
        resolved = self._resolve(q, k, v, features_of(mask, call), self._features(modifiers))
        kernel = KERNELS[resolved.kernel_name]
        windows = "windows" in kernel.takes and kernel.skips_hidden
        call = call._replace(offset_diagonal="offset_diagonal" in kernel.takes, windows=windows)
        return resolved, plan_call(mask, call)

    def _call(self, q: Tensor, k: Tensor) -> Call:
        sizes = Sizes(q.size(0), q.size(1), q.size(2) * self.shard.size, k.size(2) * self.key_shard.size)
        self.shard.check_length(sizes.queries)
        self.key_shard.check_length(sizes.keys)
        chunks, fetches = self.shard.held_chunks, not self.whole_memory
        return Call(sizes, self.shard.rank, chunks, fetches, fetches_all=self.keep_gathered)

    @property
    def key_shard(self) -> SequenceShard:
        """How keys and values are split."""
        return WHOLE_SEQUENCE if self.whole_memory else self.shard

    def _features(self, modifiers: Modifiers) -> frozenset[str]:
        """What every tile needs of a kernel."""
        wanted = {
            "softcap": self.softcap is not None,
            "dropout": modifiers.seed is not None,
            "bias": modifiers.bias is not None or modifiers.slopes is not None,
        }
        return frozenset(name for name, needed in wanted.items() if needed)

    def _resolve(
        self, q: Tensor, k: Tensor, v: Tensor, of_mask: frozenset[str], of_all: frozenset[str]
    ) -> "AttentionSpec":
        kernel = masked = select_kernel(q, self.kernel_name, of_all, v.size(-1))
        if not of_mask <= kernel.takes and "bias" not in kernel.takes:
            needs = {"bias"} if self.kernel_name == "auto" else of_mask  # or it is refused for what the mask needs
            masked = select_kernel(q, self.kernel_name, of_all | needs, v.size(-1))
        heads, head_chunks = k.size(1), self.head_chunks
        if head_chunks is None:
            most = 1 if self.keep_gathered else min(_MOST_HEAD_CHUNKS, max(1, (k.nbytes + v.nbytes) // _LEAST_BYTES))
            head_chunks = max(n for n in range(1, most + 1) if heads % n == 0)
        return replace(self, kernel_name=kernel.name, masked_kernel_name=masked.name, head_chunks=head_chunks)

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
