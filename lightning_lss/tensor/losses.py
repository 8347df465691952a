"""Rules of losses: a mean is that over the entries of all ranks."""

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from lightning_lss.sequence.borders import sum_over_ranks
from lightning_lss.sequence.replicas import number_for_mean
from lightning_lss.tensor.reductions import reduce
from lightning_lss.tensor.split_tensor import (
    Function,
    SplitTensor,
    align,
    line_of_user,
    name_of,
    part_like,
    rule,
    split_tensor,
)


@rule("cross_entropy", "nll_loss")
def cross_entropy(
    func: Function,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Of scores [N, C] or [B, C, ...], and classes [N] or [B, ...].

    The mean over all ranks' classes that are not ignored is, in training, that over all data replicas too: replicas whose
    batches have other numbers of tokens would else weigh as much (see :func:`~lightning_lss.token_mean`).
    """
    if not isinstance(x, SplitTensor) or size_average is not None or reduce is not None:
        return NotImplemented
    if x.placement.dim == 1 or target.dim() != x.part.dim() - 1 or target.dim() == 0:  # classes are split, or probable
        return NotImplemented
    placement = x.placement.at(max(0, x.placement.dim - 1))
    labels = placement.counting(part_like(target, placement, target.dim()), ignore_index)
    smoothing = {"label_smoothing": label_smoothing} if name_of(func) == "cross_entropy" else {}
    how = "none" if reduction == "none" else "sum"
    losses = func(x.part, labels, weight=weight, ignore_index=ignore_index, reduction=how, **smoothing)
    if reduction == "none":
        return split_tensor(losses, placement)
    total = sum_over_ranks(losses, placement.shard)
    if reduction == "sum":
        return total
    counts = labels != ignore_index
    number = counts.sum() if weight is None else weight.detach()[labels.where(counts, 0)].where(counts, 0).sum()
    place = crc32(repr(line_of_user()).encode()) if total.requires_grad else None
    return total / number_for_mean(number.to(total.dtype), placement.shard, place)


@rule(
    *[
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
    ]
)
@rule("poisson_nll_loss", "soft_margin_loss")
def elementwise_loss(func: Function, x: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Entry by entry, and then their mean or sum."""
    reduction = kwargs.pop("reduction", "mean")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    known = reduction in ("mean", "sum", "none") and kwargs.keys().isdisjoint({"size_average", "reduce"})
    if args or not known or any(isinstance(value, Tensor) for value in kwargs.values()):
        return NotImplemented
    parts, placement = align([x, target])
    losses = split_tensor(func(*parts, reduction="none", **kwargs), placement)
    return losses if reduction == "none" else reduce(getattr(torch, reduction), losses)
