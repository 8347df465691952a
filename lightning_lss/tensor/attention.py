"""Rules of attention: torch's own, and this package's, along a split sequence."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss.attention.functional import lss_attention
from lightning_lss.attention.masks import AttentionMask
from lightning_lss.tensor.split_tensor import (
    Function,
    SplitTensor,
    part,
    part_like,
    rule,
    shape_of,
    split,
    split_tensor,
    whole,
)


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
    func: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """[..., H, L, D] over [..., G, M, D] and [..., G, M, Dv]."""
    tensors = query, key, value
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if _independent(*tensors) and attn_mask is None and dropout_p == 0.0:  # windows of a sequence, or rows of a batch
        assert isinstance(query, SplitTensor)
        return split_tensor(func(*map(part, tensors), is_causal=is_causal, **options), query.placement)
    if query.dim() < 3 or not all(x.dim() == query.dim() for x in tensors):
        return NotImplemented
    query, key, value = split_alike(*tensors)
    if not isinstance(query, SplitTensor) or not _along(query):
        return NotImplemented
    learned = attn_mask is not None and attn_mask.requires_grad
    if learned or not fits(query, key, value):
        return NotImplemented if dropout_p > 0.0 else _rows(func, query, key, value, attn_mask, is_causal, options)
    mask, bias = read_mask(attn_mask, shape_of(query)[-2], shape_of(key)[-2])
    return attend(query, key, value, mask=mask, bias=bias, causal=is_causal, scale=scale, dropout=dropout_p)


@rule("lss_attention")
def own_attention(
    func: Function, q: Tensor, k: Tensor, v: Tensor, shard: Any = None, causal: bool = True, **options: Any
) -> Any:
    """This package's attention in a module that sees whole sequences: there its shard is the trivial one."""
    if not isinstance(q, SplitTensor) or not _along(q) or not fits(q, k, v):
        return NotImplemented
    del options["whole_memory"]
    return attend(q, k, v, causal=causal and options["mask"] is None, **options)


def attend(
    query: SplitTensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | None = None,
    bias: Tensor | None = None,
    causal: bool,
    **options: Any,
) -> SplitTensor:
    """Compute attention along a split sequence.

    Args:
        query: [..., H, L, D], split along L.
        key: [..., G, M, D], split in the same way, or whole.
        value: [..., G, M, Dv], as the keys.
        mask: of the whole sequence.
        bias: [B or 1, H or 1, L, M], whole.
        causal: without a mask, whether a query sees only keys at or before its own position.
        **options: of :func:`~lightning_lss.lss_attention`.

    Returns:
        [..., H, L, Dv], split as the queries are.
    """
    placement, keys_are_split = query.placement, isinstance(key, SplitTensor)
    q, k, v = (_with_four_dims(part(x)) for x in (query, key, value))
    options |= {"mask": mask, "bias": bias, "whole_memory": not keys_are_split}
    result = lss_attention(q, k, v, placement.filled_up, causal, **options)
    return split_tensor(result.reshape(*query.part.shape[:-1], result.size(-1)), placement)


def _with_four_dims(x: Tensor) -> Tensor:
    """[..., H, l, D] -> [B, H, l, D]"""
    return x.flatten(0, -4) if x.dim() > 4 else x.view(*[1] * (4 - x.dim()), *x.shape)


# -- how queries, keys and values are split ----------------------------------------------------------------------------


def split_alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Split whole ones of queries, keys and values as the first of the others that is as long."""
    like = [x for x in tensors if isinstance(x, SplitTensor) and _along(x)]

    def alike(x: Tensor) -> Tensor:
        found = [y.placement for y in like if y.dim() == x.dim() and shape_of(y)[-2] == shape_of(x)[-2]]
        return x if isinstance(x, SplitTensor) or not found else split(x, found[0])

    return tuple(map(alike, tensors))


def fits(query: SplitTensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values are split as the queries are, or whole, so that :func:`attend` takes them."""
    if not (isinstance(key, SplitTensor) and isinstance(value, SplitTensor)):
        return not isinstance(key, SplitTensor) and not isinstance(value, SplitTensor) and not query.placement.is_padded
    same = _along(key) and _along(value) and key.placement.shard == query.placement.shard
    padded = query.placement.is_padded or key.placement.is_padded
    return same and (not padded or key.placement == query.placement)


def _along(x: SplitTensor) -> bool:
    """Whether queries, keys or values are split along their length, and nothing is merged with it."""
    return x.placement.dim == x.part.dim() - 2 and x.placement.outer * x.placement.inner == 1


def _independent(*tensors: Tensor) -> bool:
    """Whether all are split in the same way along a dimension of the batch or of the heads."""
    placements = {x.placement if isinstance(x, SplitTensor) else None for x in tensors}
    placement = placements.pop()
    return not placements and placement is not None and placement.dim < tensors[0].dim() - 2


def _rows(
    func: Function, query: SplitTensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: Any
) -> SplitTensor:
    """Compute a rank's rows over all keys, gathered: for biases that are learned, and memories of other lengths."""
    keys, values, placement = whole(key), whole(value), query.placement
    if mask is not None:
        mask = part_like(mask, placement, max(mask.dim(), query.dim()))
    elif causal:
        positions = placement.shard.positions(query.part.size(-2), keys.device)
        mask = positions[:, None] >= torch.arange(keys.size(-2), device=keys.device)
    return split_tensor(func(query.part, keys, values, mask, 0.0, False, **options), placement)


# -- masks that are tensors --------------------------------------------------------------------------------------------


def read_mask(given: Tensor | None, queries: int, keys: int) -> tuple[AttentionMask | None, Tensor | None]:
    """Say what a mask as torch's attention takes it shows, and what it adds to scores.

    ``given`` is broadcast to [B, H, L, M]: bool, true where a key is visible, or added to the scores, and not learned. One
    that is 0 or -inf is no bias. One that is the same for all queries takes little memory, and a triangle none.
    """
    if given is None:
        return None, None
    assert not given.requires_grad
    given = whole(given)
    visible = given = given.view(*[1] * (4 - given.dim()), *given.shape)
    if given.dtype != torch.bool:
        visible = given > torch.finfo(given.dtype).min / 2
        if not bool(((given == 0) | ~visible).all()):
            return None, given.expand(*given.shape[:2], queries, keys)
    if visible.shape[1:3] == (1, 1) and queries > 1:
        return AttentionMask.key_padding(visible[:, 0, 0].expand(-1, keys)), None
    visible = visible.expand(*visible.shape[:2], queries, keys)
    return AttentionMask.causal() if _is_triangle(visible) else AttentionMask.from_dense(visible), None


def _is_triangle(visible: Tensor) -> bool:
    if visible.shape[:2] != (1, 1) or visible.size(2) != visible.size(3):
        return False
    return torch.equal(visible[0, 0], torch.ones_like(visible[0, 0]).tril())
