"""Attention along a split sequence as a function; the algorithm is in :mod:`lightning_lss.attention.operator`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from lightning_lss.attention.kernels import select_kernel
from lightning_lss.attention.kinds import Sizes
from lightning_lss.attention.masks import AttentionMask
from lightning_lss.attention.operator import attend, spec_fields
from lightning_lss.attention.spec import AttentionSpec, HeadChunks, Modifiers, check_head_chunks
from lightning_lss.sequence.dtypes import in_autocast_dtype
from lightning_lss.sequence.random import draw_seed
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard


def lss_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard = WHOLE_SEQUENCE,
    causal: bool = True,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    whole_memory: bool = False,
    kernel: str = "auto",
    head_chunks: HeadChunks = "auto",
    keep_gathered: bool = False,
) -> Tensor:
    """Compute softmax attention of this rank's queries over the keys and values of the whole sequence (LSS Transformer,
    arXiv 2311.02382).

    Every rank of the sequence group must call it. Gradients are exact; second derivatives are not supported.

    Args:
        q: [B, H, l, D], this rank's segment of the queries.
        k: [B, G, l, D], this rank's segment of the keys; H is a multiple of G (grouped-query heads). For cross-attention
            [B, G, m, D], a segment of a memory of another length, split over the same ranks.
        v: [B, G, l, Dv], this rank's segment of the values.
        shard: the rank's place in its sequence group; the default is a whole sequence, and plain attention.
        causal: whether a query sees only keys at or before its own global position; without effect if there is a mask.
        mask: which keys each query sees, by global position. A query that sees none gets 0.
        scale: factor on the scores, 1 / sqrt(D) by default.
        softcap: limits scores to ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [H], a further score for each row of a head, of a value that is zero (gpt-oss, arXiv 2508.10925; "off by
            one" attention). It has a gradient, which like that of any shared parameter is this rank's part.
        bias: [B or 1, H or 1, L, L] (for a memory [..., L, M]), added to the scores by global position, whole on every
            rank. It has no gradient. Numbers at or below half of ``finfo.min`` of its dtype (of float32, for float64) are
            minus infinity: they hide a pair, and a query that sees no key gets 0, not the mean of all values. Other large
            negative numbers are added as they are; a row that has nothing else loses the digits of its scores.
        alibi_slopes: [H], of a bias of -slope * (distance of query and key) (ALiBi, arXiv 2108.12409, section 3). They have
            no gradient.
        dropout: probability of dropping each attention weight. What is dropped depends on a seed from torch's default CPU
            generator and on the place of query and key in the whole sequence, not on S.
        whole_memory: whether ``k`` and ``v`` are a memory [B, G, M, D] that every rank holds whole, for cross-attention.
        kernel: ``"auto"`` or a name in :data:`lightning_lss.attention.kernels.KERNELS`.
        head_chunks: number of parts in which the key/value heads are gathered, a divisor of G; ``"auto"`` takes up to 8
            of at least 1 MiB each.
        keep_gathered: keep the gathered keys and values for the backward pass instead of gathering them again. A layer
            then has two collectives, one all-gather and one reduce-scatter, as in the paper. The price is K and V of
            the whole sequence in memory between forward and backward.

    Returns:
        [B, H, l, Dv] in the dtype of ``q`` (under autocast: in autocast's dtype).

    Raises:
        ValueError: if shapes, dtypes or options are incompatible; the message names the values.
        TypeError: if the mask is not an :class:`~lightning_lss.AttentionMask`.
        RuntimeError: if the shard is of an earlier batch.
    """
    if has_torch_function((q, k, v)):  # they are shown as whole sequences, see SplitTensor
        scores: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks, "bias": bias}
        scores |= {"alibi_slopes": alibi_slopes, "dropout": dropout}
        how: dict[str, Any] = {
            "whole_memory": whole_memory,
            "kernel": kernel,
            "head_chunks": head_chunks,
            "keep_gathered": keep_gathered,
        }
        return handle_torch_function(lss_attention, (q, k, v), q, k, v, shard, causal, **scores, **how)
    shard.check_current()
    q, k, v = in_autocast_dtype(q, k, v)
    queries, keys = q.size(2) * shard.size, k.size(2) * (1 if whole_memory else shard.size)
    _check_inputs(q, k, v, causal and mask is None and queries != keys)
    check_softcap(softcap)
    check_dropout(dropout)
    if shard.padding and (not causal or mask is not None or bias is not None):
        _check_filled_up(q, k, mask, bias, shard, whole_memory)
        bias = None if bias is None else F.pad(bias, [0, shard.padding] * 2)
    _check_modifiers(q, queries, keys, sinks, bias, alibi_slopes)
    if mask is not None:
        _check_mask(mask)
        if not torch.compiler.is_compiling():  # else the operator says it when it runs
            more_keys = 0 if whole_memory else shard.padding
            mask.check(Sizes(q.size(0), q.size(1), queries - shard.padding, keys - more_keys))
    # with grouped-query heads torch's attention stores all scores, except in its flash kernels
    untouched = all(x is None for x in (mask, softcap, sinks, bias, alibi_slopes)) and dropout == 0.0
    plain = shard.size == 1 and kernel == "auto" and untouched and q.size(-1) == v.size(-1)
    if plain and (q.size(1) == k.size(1) or select_kernel(q).name.endswith("flash")):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
    if q.stride(-1) != 1:  # the kernels read heads as contiguous rows, and do not check
        q = q.contiguous()
    check_head_chunks(head_chunks, k.size(1), keep_gathered)
    spec = AttentionSpec(
        shard,
        causal,
        q.size(-1) ** -0.5 if scale is None else scale,
        kernel,
        head_chunks=None if head_chunks == "auto" else head_chunks,
        keep_gathered=keep_gathered,
        softcap=softcap,
        dropout=dropout,
        whole_memory=whole_memory,
    )
    modifiers = Modifiers(
        sinks,
        None if mask is None else mask.words,
        None if shard.assignment is None else shard.assignment.tensor,
        bias,
        alibi_slopes,
        draw_seed() if dropout > 0.0 else None,
    )
    return attend(q, k, v, *modifiers, **spec_fields(spec))[0]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, causal_memory: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"Attention takes [batch, heads, length, width] tensors; got {shapes}.")
    if k.shape[:3] != v.shape[:3] or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(
            f"Queries, keys and values must agree in batch, queries and keys in head width, keys and values in heads and length;"
            f" got {shapes}."
        )
    if causal_memory:
        raise ValueError(
            f"Causal attention needs as many keys as queries; got {shapes}. For attention to a memory write causal=False."
        )
    if q.size(2) and not k.size(2):
        raise ValueError(
            f"There are no keys: {shapes}. Pass a memory of 1 or more positions, or leave attention to it out."
        )
    if q.size(1) % k.size(1):
        raise ValueError(
            f"The number of query heads must be a multiple of the number of key/value heads; got {shapes}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"Queries, keys and values must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")


def _check_mask(mask: object) -> None:
    if not isinstance(mask, AttentionMask):
        raise TypeError(
            f"mask must be an AttentionMask, not {type(mask).__name__}: make one with AttentionMask.from_dense(visible), or, for far"
            " less, with AttentionMask.documents, .padding, .sliding_window and the like."
        )


def _check_filled_up(
    q: Tensor, k: Tensor, mask: AttentionMask | None, bias: Tensor | None, shard: SequenceShard, whole_memory: bool
) -> None:
    """Raise ``ValueError`` if a memory is not filled up as the queries are, and that matters."""
    by_query = bias is not None or (isinstance(mask, AttentionMask) and mask.num_queries is not None)
    if (whole_memory and by_query) or (not whole_memory and k.size(2) != q.size(2)):
        raise ValueError(
            f"The sequences of this batch were filled up by {shard.padding} positions to {q.size(2) * shard.size} queries, but a memory of"
            f" {k.size(2) * (1 if whole_memory else shard.size)} keys cannot be filled up alike. Use sequences of a length that can be"
            " divided, or a memory that every rank holds whole, and no mask or bias by query."
        )


def check_dropout(p: float) -> None:
    """Raise ``ValueError`` unless ``p`` is a probability of dropping attention weights."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout={p} must be in [0, 1): it is the probability of dropping an attention weight.")


def check_softcap(softcap: float | None) -> None:
    """Raise ``ValueError`` unless ``softcap`` is a limit of scores, or None."""
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no limit.")


def _check_modifiers(
    q: Tensor, queries: int, keys: int, sinks: Tensor | None, bias: Tensor | None, slopes: Tensor | None
) -> None:
    for name, x in (("sinks", sinks), ("alibi_slopes", slopes)):
        if x is not None and x.shape != q.shape[1:2]:
            raise ValueError(f"{name} must be [{q.size(1)}], one for each query head; got {tuple(x.shape)}.")
    for name, x in (("bias", bias), ("alibi_slopes", slopes)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} has no gradient in lss_attention, but requires one: it would never be trained. Pass {name}.detach()."
            )
    if bias is None:
        return
    if not bias.is_floating_point():
        raise ValueError(
            f"bias is added to the scores and must be floating-point; got {bias.dtype}. For what is visible use"
            " mask=AttentionMask.from_dense(visible)."
        )
    wanted = (q.size(0), q.size(1), queries, keys)
    if (
        bias.dim() != 4
        or any(n not in (1, most) for n, most in zip(bias.shape[:2], wanted))
        or bias.shape[2:] != wanted[2:]
    ):
        raise ValueError(
            f"bias must be [{q.size(0)} or 1, {q.size(1)} or 1, {queries}, {keys}], of the whole sequence; got {tuple(bias.shape)}."
        )
