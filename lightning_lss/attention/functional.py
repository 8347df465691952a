"""Attention along a split sequence as a function; the algorithm is in :mod:`lightning_lss.attention.operator`."""

from torch import Tensor
from torch.nn import functional as F

from lightning_lss.attention.kernels import select_kernel
from lightning_lss.attention.operator import attend, spec_fields
from lightning_lss.attention.spec import AttentionSpec, HeadChunks, check_head_chunks
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard


def lss_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard = WHOLE_SEQUENCE,
    causal: bool = True,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    head_chunks: HeadChunks = "auto",
    keep_gathered: bool = False,
) -> Tensor:
    """Compute softmax attention of this rank's queries over the keys and values of the whole sequence (LSS Transformer,
    arXiv 2311.02382).

    Every rank of the sequence group must call it. Gradients are exact; second derivatives are not supported.

    Args:
        q: [B, H, l, D], this rank's segment of the queries.
        k: [B, G, l, D], this rank's segment of the keys; H is a multiple of G (grouped-query heads).
        v: [B, G, l, D], this rank's segment of the values.
        shard: the rank's place in its sequence group; the default is a whole sequence, and plain attention.
        causal: whether a query sees only keys at or before its own global position.
        scale: factor on the scores, 1 / sqrt(D) by default.
        kernel: ``"auto"`` or a name in :data:`lightning_lss.attention.kernels.KERNELS`.
        head_chunks: number of parts in which the key/value heads are gathered, a divisor of G; ``"auto"`` takes up to 8
            of at least 1 MiB each.
        keep_gathered: keep the gathered keys and values for the backward pass instead of gathering them again. A layer
            then has two collectives, one all-gather and one reduce-scatter, as in the paper. The price is K and V of
            the whole sequence in memory between forward and backward.

    Returns:
        [B, H, l, D] in the dtype of ``q`` (under autocast: in autocast's dtype).

    Raises:
        ValueError: if shapes, dtypes or options are incompatible; the message names the values.
    """
    q, k, v = in_autocast_dtype(q, k, v)
    _check_inputs(q, k, v)
    # with grouped-query heads torch's attention stores all scores, except in its flash kernels
    plain = shard.size == 1 and kernel == "auto"
    if plain and (q.size(1) == k.size(1) or select_kernel(q).name.endswith("flash")):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
    if q.stride(-1) != 1:  # the kernels read heads as contiguous rows, and do not check
        q = q.contiguous()
    check_head_chunks(head_chunks, k.size(1), keep_gathered)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    spec = AttentionSpec(shard, causal, scale, kernel, None if head_chunks == "auto" else head_chunks, keep_gathered)
    return attend(q, k, v, **spec_fields(spec))[0]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"Attention takes [batch, heads, length, width] tensors; got {shapes}.")
    if k.shape != v.shape or q.size(0) != k.size(0) or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"Queries, keys and values must agree in batch, length and head width, and k with v in heads; got {shapes}."
        )
    if q.size(1) % k.size(1):
        raise ValueError(
            f"The number of query heads must be a multiple of the number of key/value heads; got {shapes}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"Queries, keys and values must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
