"""The rule of ``nn.MultiheadAttention``, which projects before and after it attends."""

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.attention.masks import AttentionMask
from lightning_lss.tensor.attention import attend, fits, read_mask, split_alike
from lightning_lss.tensor.split_tensor import Function, SplitTensor, rule, whole


@rule("multi_head_attention_forward", composed=True)
def multi_head_attention_forward(
    func: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Query [L, B, E], key and value [M, B, E] -> [L, B, E]; attention weights are not computed."""
    if add_zero_attn or any(x is not None for x in (bias_k, bias_v, static_k, static_v)) or query.dim() != 3:
        return NotImplemented
    weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        weights = [*in_proj_weight.chunk(3)]
    biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)  # type: ignore[arg-type]
        for x, w, b in zip((query, key, value), weights, biases)
    )
    pairs, keys = _visible(attn_mask), _visible(key_padding_mask)
    if (
        is_causal and keys is None and not need_weights
    ):  # as torch: the caller says what the mask is, and nobody looks at it
        pairs = None
    if pairs is not None and pairs.dim() == 3:
        pairs = pairs.unflatten(0, (-1, num_heads))
    keys = None if keys is None else keys[:, None, None]
    attended = _attend(q, k, v, pairs, keys, is_causal and pairs is None, dropout_p if training else 0.0)
    result = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    return result, WeightsNotComputed() if need_weights else None


def _visible(hidden: Tensor | None) -> Tensor | None:
    """A mask as torch's attention takes it, of one as ``nn.MultiheadAttention`` takes it, where true hides."""
    hidden = whole(hidden)
    return ~hidden if hidden is not None and hidden.dtype == torch.bool else hidden


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor | None, keys: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """Attend where a mask of pairs, [L, M] or [B, H, L, M], and one of keys [B, 1, 1, M] show it."""
    q, k, v = split_alike(q, k, v)
    lengths, given = (q.shape[2], k.shape[2]), [x for x in (pairs, keys) if x is not None]
    if isinstance(q, SplitTensor) and fits(q, k, v) and not any(x.requires_grad for x in given):
        read = [read_mask(x, *lengths) for x in given]
        masks = [mask for mask, _ in read if mask is not None]
        biases = [bias for _, bias in read if bias is not None]
        if masks and causal:
            masks.append(AttentionMask.causal())
        mask = reduce(operator.and_, masks) if masks else None
        bias = reduce(operator.add, biases) if biases else None
        return attend(q, k, v, mask=mask, bias=bias, causal=causal and mask is None, dropout=dropout)
    if given and causal:
        given.append(torch.ones(lengths, dtype=torch.bool, device=k.device).tril())
    joined = reduce(_both, given) if given else None
    return F.scaled_dot_product_attention(q, k, v, joined, dropout, causal and joined is None)


def _both(one: Tensor, other: Tensor) -> Tensor:
    """What two masks as torch's attention takes them show and add together."""
    if one.dtype == other.dtype == torch.bool:
        return one & other
    return _added(one) + _added(other)


def _added(mask: Tensor) -> Tensor:
    """A mask as it is added to scores."""
    return (
        torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


class WeightsNotComputed:
    """Stands for the attention weights that ``nn.MultiheadAttention`` returns, and most modules drop."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The weights of attention along a split sequence are not computed, so they have no {name!r}: that would take the memory of"
            " all pairs of positions. Compute them from queries and keys where you need them."
        )
