"""Rules of dropout: what is dropped depends on the place in the whole tensor, not on the rank that holds it."""

from math import prod

import torch

from lightning_lss.sequence.random import draw_seed, kept
from lightning_lss.tensor.split_tensor import Function, SplitTensor, name_of, rule, split_tensor


@rule("dropout", "dropout_")
def dropout(
    func: Function,
    x: SplitTensor,
    p: float = 0.5,
    train: bool = True,
    inplace: bool = False,
    *,
    training: bool | None = None,
) -> SplitTensor:
    """Of single entries."""
    if not (train if training is None else training) or not 0.0 < p < 1.0:
        return x if p != 1.0 else split_tensor(x.part * 0.0, x.placement)
    placement, shape, device = x.placement, x.part.shape, x.part.device
    rows = torch.arange(prod(shape[: placement.dim]) * placement.outer, device=device)
    positions = placement.shard.positions(placement.padded // placement.shard.size, device)
    features = torch.arange(prod(shape[placement.dim + 1 :]) * placement.inner, device=device)
    keep = kept(draw_seed(), rows[:, None, None], positions[:, None], features, p=p).view(shape)
    if inplace or name_of(func) == "dropout_":
        x.part.mul_(keep).mul_(1 / (1 - p))
        return x
    return split_tensor((x.part * keep).mul_(1 / (1 - p)), placement)
