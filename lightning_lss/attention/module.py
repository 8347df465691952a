"""Attention along a split sequence as a module, ``LSSAttention``."""

from torch import Tensor

from lightning_lss.attention.functional import lss_attention
from lightning_lss.attention.spec import HeadChunks
from lightning_lss.sequence.segment import ShardedModule


class LSSAttention(ShardedModule):
    """Attention along the split sequence, as a module without parameters.

    :class:`~lightning_lss.LSSStrategy` sets its shard. Without one it is plain attention, so a model that uses it runs
    unchanged on one device. For the arguments see :func:`lss_attention`.
    """

    def __init__(
        self,
        causal: bool = True,
        *,
        scale: float | None = None,
        kernel: str = "auto",
        head_chunks: HeadChunks = "auto",
        keep_gathered: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.scale, self.kernel = causal, scale, kernel
        self.head_chunks, self.keep_gathered = head_chunks, keep_gathered

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: q [B, H, l, D], k and v [B, G, l, D] -> [B, H, l, D]; see :func:`lss_attention`."""
        return lss_attention(
            q,
            k,
            v,
            self.shard,
            self.causal,
            scale=self.scale,
            kernel=self.kernel,
            head_chunks=self.head_chunks,
            keep_gathered=self.keep_gathered,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"causal={self.causal}, kernel={self.kernel!r}, head_chunks={self.head_chunks}, keep_gathered={self.keep_gathered}"
