"""Attention along a split sequence as a module, ``LSSAttention``."""

from torch import Tensor

from lightning_lss.attention.functional import check_dropout, check_softcap, lss_attention
from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.spec import HeadChunks
from lightning_lss.sequence.segment import ShardedModule


class LSSAttention(ShardedModule):
    """Attention along the split sequence, as a module without parameters.

    :class:`~lightning_lss.LSSStrategy` sets its shard. Without one it is plain attention, so a model that uses it runs
    unchanged on one device. ``dropout`` is on in training mode only. For the other arguments see :func:`lss_attention`.

    Raises:
        ValueError: if ``dropout`` or ``softcap`` is out of range.
    """

    def __init__(
        self,
        causal: bool = True,
        *,
        mask: AttentionMask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        whole_memory: bool = False,
        kernel: str = "auto",
        head_chunks: HeadChunks = "auto",
        keep_gathered: bool = False,
    ) -> None:
        super().__init__()
        check_softcap(softcap)
        check_dropout(dropout)
        self.causal, self.mask, self.scale, self.softcap, self.dropout = causal, mask, scale, softcap, dropout
        self.whole_memory, self.kernel = whole_memory, kernel
        self.head_chunks, self.keep_gathered = head_chunks, keep_gathered

    @property
    def default_mask(self) -> AttentionMask:
        """The mask of a call that is not given one."""
        if self.mask is not None:
            return self.mask
        return AttentionMask.causal() if self.causal else AttentionMask.full()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | None = None,
        *,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Attend: q [B, H, l, D], k [B, G, l, D] and v [B, G, l, Dv] -> [B, H, l, Dv]; see :func:`lss_attention`.

        A ``mask`` takes the place of the module's own.
        """
        return lss_attention(
            q,
            k,
            v,
            self.shard,
            self.causal,
            mask=self.mask if mask is None else mask,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            bias=bias,
            alibi_slopes=alibi_slopes,
            dropout=self.dropout if self.training else 0.0,
            whole_memory=self.whole_memory,
            kernel=self.kernel,
            head_chunks=self.head_chunks,
            keep_gathered=self.keep_gathered,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        seen = f"causal={self.causal}" if self.mask is None else f"mask={self.mask}"
        return f"{seen}, kernel={self.kernel!r}, head_chunks={self.head_chunks}, keep_gathered={self.keep_gathered}"
