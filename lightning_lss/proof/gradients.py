"""Compare the gradients of two passes by the name of the parameter, with tolerances that follow the precision."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_lss.parallel.fsdp import FullyShard
from lightning_lss.parallel.replicated import Replicated
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
    parameters: Replicated | FullyShard,
) -> list[GradientError]:
    """Compare the gradients of this rank's segment with those of the whole sequence, the worst first.

    Every rank that rehearses must call it, and all get the same. Both are used up. That of a positional table is compared
    with this rank's rows of the whole one; backward has summed it over the group (see
    :mod:`lightning_lss.parallel.segment_local`).
    """
    trained = {name: x for name, x in module.named_parameters() if x.requires_grad}
    local = set(segment_local_names(module))
    group = parameters.rehearsing_group(shard.require_group())
    squares = []
    for name, parameter in trained.items():
        own, reference = split.pop(name, None), whole.pop(name, None)
        if name in local:
            own = None if own is None else own / shard.size
            reference = None if reference is None else shard.split(reference, dim=0)
        elif not isinstance(parameter, DTensor):
            own = parameters.average(torch.zeros_like(parameter) if own is None else own, group)
        squares.append(_squares(own, reference, parameter.device))
        del own, reference
    table = torch.stack(squares)  # [parameters, 3]: squares of the difference and of the whole one, number of elements
    parts = torch.tensor([x in local or isinstance(p, DTensor) for x, p in trained.items()], device=table.device)
    summed = table * parts[:, None]  # each rank has a part of these
    dist.all_reduce(summed, group=group)
    table = torch.where(parts[:, None], summed, table)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)  # rounding may differ; the verdict may not
    difference, norm, count = table.cpu().unbind(1)
    usual = LEAST * (norm.sum() / count.sum() * count).sqrt()
    errors = difference.sqrt() / torch.maximum(norm.sqrt(), usual).clamp(min=torch.finfo(torch.float64).tiny)
    errors = errors.nan_to_num(nan=torch.inf)
    found = [GradientError(*x) for x in zip(trained, errors.tolist(), norm.sqrt().tolist())]
    return sorted(found, key=lambda x: -x.error)


def _squares(own: Tensor | None, reference: Tensor | None, device: torch.device) -> Tensor:
    """Return the squared norms of the difference and of the reference, and the number of elements; None stands for zeros."""
    own, reference = (x.to_local() if isinstance(x, DTensor) else x for x in (own, reference))
    some = own if own is not None else reference
    if some is None:
        return torch.zeros(3, dtype=torch.float64, device=device)
    wide = torch.promote_types(some.dtype, torch.float32)
    difference = some if own is None or reference is None else own.to(wide) - reference
    norms = [0.0 if x is None else torch.linalg.vector_norm(x, dtype=wide) for x in (difference, reference)]
    return (
        torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in (*norms, some.numel() ** 0.5)])
        ** 2
    )
