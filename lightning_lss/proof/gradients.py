"""Compare the gradients of two passes by the name of the parameter, with tolerances that follow the precision."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lss.sequence.segment import SequenceShard, segment_local_names

LEAST = 1e-3
"""The least gradient to divide by, as a part of the root mean square of all: some gradients, such as that of a bias of the
keys, are nothing but rounding."""


class GradientError(NamedTuple):
    """How far the gradient of a parameter is from that of one device."""

    name: str
    error: float
    """||split - whole|| / ||whole||, where ||whole|| counts as no less than :data:`LEAST` of what is usual."""
    norm: float
    """||whole||."""


def compare(
    split: dict[str, Tensor],
    whole: dict[str, Tensor],
    module: nn.Module,
    shard: SequenceShard,
    average: Callable[[Tensor], Tensor],
) -> list[GradientError]:
    """Compare the gradients of this rank's segment with those of the whole sequence, the worst first.

    Every rank of the world must call it, and all get the same. Both are used up. ``average`` averages a shared gradient
    over the world. That of a positional table is compared with this rank's rows of the whole one; backward has summed it
    over the group (see :mod:`lightning_lss.parallel.segment_local`).
    """
    trained = {name: x for name, x in module.named_parameters() if x.requires_grad}
    local = set(segment_local_names(module))
    squares = []
    for name, parameter in trained.items():
        own, reference = split.pop(name, None), whole.pop(name, None)
        if name in local:
            own = None if own is None else own / shard.size
            reference = None if reference is None else _rows(reference, shard)
        elif not isinstance(parameter, DTensor):
            own = average(torch.zeros_like(parameter) if own is None else own)
        squares.append(_squares(own, reference, parameter, name in local))
        del own, reference
    table = torch.stack(squares)  # [parameters, 3]: squares of the difference and of the whole one, number of elements
    parts = torch.tensor([x in local or isinstance(p, DTensor) for x, p in trained.items()], device=table.device)
    summed = table * parts[:, None]  # each rank has a part of these
    dist.all_reduce(summed)
    table = torch.where(parts[:, None], summed, table)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)  # rounding may differ; the verdict may not
    difference, norm, count = table.cpu().unbind(1)
    usual = LEAST * (norm.sum() / count.sum() * count).sqrt()
    errors = difference.sqrt() / torch.maximum(norm.sqrt(), usual).clamp(min=torch.finfo(torch.float64).tiny)
    errors = errors.nan_to_num(nan=torch.inf)
    found = [GradientError(*x) for x in zip(trained, errors.tolist(), norm.sqrt().tolist())]
    return sorted(found, key=lambda x: -x.error)


def _rows(table: Tensor, shard: SequenceShard) -> Tensor:
    return shard.split(table, dim=0)


def _squares(own: Tensor | None, reference: Tensor | None, like: Tensor, is_local: bool) -> Tensor:
    def norm(x: Tensor | None) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        return zero if x is None else torch.linalg.vector_norm(x, dtype=_wide(x)).double() ** 2

    own, reference = (x.to_local() if isinstance(x, DTensor) else x for x in (own, reference))
    some = own if own is not None else reference
    count = torch.tensor(0 if some is None else some.numel(), dtype=torch.float64, device=like.device)
    if own is not None and reference is not None:
        return torch.stack([norm(own.to(_wide(own)) - reference), norm(reference), count])
    return torch.stack([norm(some), norm(reference), count])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
