"""Numbers that data replicas add up in a training step, without waiting for a replica that has none to add.

What a step computes may depend on its batch: a loss only where there is something to learn, or on tokens that are picked.
So replicas need not call the same functions. They meet at the end of a step, and before each backward pass within it; one that is
there answers the others until all are.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.collectives import all_gather
from lightning_lss.sequence.segment import SequenceShard

_DONE = 0


def number_for_mean(number: Tensor, shard: SequenceShard, place: int | None) -> Tensor:
    """Divide the sum of a sequence group's losses by this, so that the mean over data replicas is that over all entries.

    Args:
        number: of this rank's entries, a scalar.
        shard: the rank's place in its sequence group.
        place: where in the code the loss is computed, not 0. Replicas that compute another one meanwhile, or none, do not
            count. None in evaluation, where replicas need not take steps together: each has its own mean.
    """
    group = shard.require_group() if place is None else _world()
    numbers, places = _gather(number, place or 1, group).unbind(1)
    same = places == (place or 1)
    count = same.sum() / shard.size  # of replicas
    return (numbers.where(same, 0).sum() / count).to(number.dtype)


def meet(shard: SequenceShard, device: torch.device) -> None:
    """Answer replicas that still add numbers up, until none does; every rank must call it."""
    if shard.size == dist.get_world_size():
        return
    own = torch.zeros((), device=device)
    while bool(_gather(own, _DONE, _world())[:, 1].any()):
        pass


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _gather(number: Tensor, place: int, group: dist.ProcessGroup) -> Tensor:
    """What each rank of ``group`` has, [ranks, 2]."""
    own = number.new_tensor([0, place], dtype=torch.float64)
    own[0] = number
    return all_gather(own, group).wait()
