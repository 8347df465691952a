"""The two collectives of the LSS Transformer, each with its group given explicitly and a handle to wait on.

Each is there as torch has it (over gloo its coalesced form, of a single tensor: the plain ones copy rank by rank and
take twice the time to gather, a third more to scatter), and made of what gloo does better.

``torch`` 2.13 renamed ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` and deprecated the old names, which are
the only ones in 2.11: the module takes whichever is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(NamedTuple):
    """A tensor that is still being filled by others."""

    tensor: Tensor
    works: Sequence[dist.Work] = ()
    addends: bool = False
    """Whether the tensor is the addends of a sum, stacked along dimension 0."""

    def wait(self) -> Tensor:
        """Block (on CUDA: the current stream) until the tensor is complete, and return it, or its sum. Once: a message
        that is waited for again never comes."""
        for work in self.works:
            work.wait()
        for exchanges in _under_way.values():  # of each group: what began before is over too
            if self.works in exchanges:
                del exchanges[: exchanges.index(self.works) + 1]
        return self.tensor.sum(0) if self.addends else self.tensor


def all_gather(local: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> Pending:
    """Start to gather ``local``, of one shape on every rank of ``group``, into ``[size, *local.shape]`` by rank, which
    is ``out`` where that is given; ``local`` may be its place there."""
    gathered = local.new_empty((dist.get_world_size(group), *local.shape)) if out is None else out
    whole, own = gathered.view(-1), local.contiguous().view(-1)
    if is_gloo(own, group):
        return Pending(gathered, [group.allgather_into_tensor_coalesced([whole], [own])])
    return Pending(gathered, [_all_gather(whole, own, group=group, async_op=True)])


def reduce_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum ``stacked`` ``[size, *shape]`` over ``group``; rank ``r`` receives entry ``r`` of the sum.

    The adjoint of :func:`all_gather`. ``stacked`` must not be written to before the result has been waited for.
    """
    local = stacked.new_empty(stacked.shape[1:])
    own, whole = local.view(-1), stacked.contiguous().view(-1)
    if is_gloo(own, group):
        return Pending(local, [group.reduce_scatter_tensor_coalesced([own], [whole])])
    return Pending(local, [_reduce_scatter(own, whole, group=group, async_op=True)])


def exchange(places: Sequence[Sequence[Tensor]], group: dist.ProcessGroup) -> Sequence[dist.Work]:
    """Start to fill ``places[r]``, contiguous tensors, with what rank ``r`` of ``group`` has in its own ``places[r]``,
    which must not be written to before all is over.

    :func:`all_gather` in messages from each rank to each. Gloo gathers into a tensor of its own and copies from there;
    messages take a third to a half of the time, and what arrives need not lie side by side.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    works: list[dist.Work] = []
    _under_way[group.group_name].append(works)
    for step in range(1, size):  # every rank begins with another, so that no one is asked by all at once
        source, destination = (rank - step) % size, (rank + step) % size
        for arriving, own in zip(places[source], places[rank]):
            works += [group.recv([arriving], source, 0), group.send([own], destination, 0)]
    return works


# Exchanges by group, in the order in which they began, which is that in which gloo carries them out. Gloo drops a message
# with its work, and then all that follow it between the two ranks, so messages outlive whoever started them: a kernel may
# raise meanwhile, and the error be caught on every rank (Lightning's batch size finder).
_under_way: defaultdict[str, list[Sequence[dist.Work]]] = defaultdict(list)


def all_to_all_sum(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """:func:`reduce_scatter` in an all-to-all, whose addends are summed when they are waited for.

    Gloo's reduce-scatter is an all-reduce inside, where every rank receives every sum. This is half the bytes.
    """
    received = stacked.new_empty(stacked.shape)
    work = dist.all_to_all_single(received.view(-1), stacked.contiguous().view(-1), group=group, async_op=True)
    return Pending(received, [work], addends=True)


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group that torch knows by ``name``, its ``group_name``."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def is_gloo(x: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether gloo is what carries ``x`` in ``group``."""
    return x.is_cpu and "gloo" in str(dist.get_backend_config(group))
