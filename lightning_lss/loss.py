"""A loss whose average over the world is the mean over all tokens."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""The target of a token that does not count, as in torch's ``cross_entropy``."""


def token_mean(loss_sum: Tensor, num_tokens: Tensor | int) -> Tensor:
    """This rank's loss such that its average over the world is (sum over all tokens) / (number of all tokens).

    The average over ranks of means over segments is not that where ranks hold different numbers of counted tokens
    (padding, masked targets). Gradients that DDP averages over the world come out right with this one. Every rank must
    call it.

    Args:
        loss_sum: sum of the losses of the local tokens, a scalar.
        num_tokens: how many local tokens were counted; 0 makes this rank contribute 0. ``loss_sum`` must depend on the
            model's output all the same: other ranks wait for this one in the backward pass of attention.

    Returns:
        a scalar of the dtype of ``loss_sum``; 0 if no rank has tokens.
    """
    count = torch.as_tensor(num_tokens, device=loss_sum.device).detach().to(torch.int64, copy=True)
    world_size = 1
    total = count
    if dist.is_available() and dist.is_initialized():
        world_size = dist.get_world_size()
        total = count.clone()
        dist.all_reduce(total)
    counted = torch.where(count > 0, loss_sum, loss_sum.new_zeros(()))
    wide = counted.to(torch.promote_types(counted.dtype, torch.float32))  # in float16 the product would overflow
    return (wide * world_size / total.clamp(min=1)).to(loss_sum.dtype)
