"""The two collectives of the LSS Transformer, over an explicit group and with a handle to wait on.

Each has two forms. :func:`all_gather` and :func:`reduce_scatter` are torch's own; over gloo they use the coalesced
operators, since the plain ones copy rank by rank and take twice the time to gather and a third more to scatter.
:func:`exchange` and :func:`all_to_all_sum` do the same in operations that gloo does faster.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# torch 2.13 renamed all_gather_into_tensor and reduce_scatter_tensor, and deprecated the names of 2.11
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(NamedTuple):
    """A tensor that communication is still filling."""

    tensor: Tensor
    works: Sequence[dist.Work] = ()
    finish: Callable[[Tensor], Tensor] | None = None
    """What makes the result of the tensor once it is complete."""

    def wait(self) -> Tensor:
        """Block (on CUDA: the current stream) until the tensor is complete, and return it, or what ``finish`` makes of it.

        Call it once: a second wait for the same message never ends.
        """
        for work in self.works:
            work.wait()
        for exchanges in _under_way.values():  # earlier exchanges of the same group are complete too
            if self.works in exchanges:
                del exchanges[: exchanges.index(self.works) + 1]
        return self.tensor if self.finish is None else self.finish(self.tensor)


def all_gather(local: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> Pending:
    """Start to gather ``local``, of one shape on all ranks, into ``out`` ``[size, *local.shape]``, ordered by rank.

    ``out`` is contiguous, and ``local`` may be a view of its entry in it; None allocates it.
    """
    gathered = local.new_empty((dist.get_world_size(group), *local.shape)) if out is None else out
    whole, own = gathered.view(-1), local.contiguous().view(-1)
    if is_gloo(own, group):
        return Pending(gathered, [group.allgather_into_tensor_coalesced([whole], [own])])
    return Pending(gathered, [_all_gather(whole, own, group=group, async_op=True)])


def reduce_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum ``stacked`` ``[size, *shape]`` over ``group``; rank ``r`` receives entry ``r`` of the sum.

    It is the adjoint of :func:`all_gather`. Do not write to ``stacked`` before the wait for the result.
    """
    local = stacked.new_empty(stacked.shape[1:])
    own, whole = local.view(-1), stacked.contiguous().view(-1)
    if is_gloo(own, group):
        return Pending(local, [group.reduce_scatter_tensor_coalesced([own], [whole])])
    return Pending(local, [_reduce_scatter(own, whole, group=group, async_op=True)])


def exchange(buffers: Sequence[Sequence[Tensor]], group: dist.ProcessGroup) -> Sequence[dist.Work]:
    """Start an :func:`all_gather` made of messages between every two ranks.

    Gloo's gather fills a tensor of its own and copies from there. Messages take a third to a half of the time, and
    their destinations need not be adjacent in memory: the contiguous tensors ``buffers[r]`` receive what rank ``r`` of
    ``group`` holds in its own ``buffers[r]``. Do not write to any before all works are complete.
    """
    rank = dist.get_rank(group)
    return send_and_receive([buffers[rank]] * len(buffers), buffers, group)


def send_and_receive(
    outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], group: dist.ProcessGroup
) -> Sequence[dist.Work]:
    """Start to send the contiguous tensors ``outgoing[r]`` to each other rank ``r`` of ``group``, and to receive
    ``incoming[r]`` from it; what one rank sends to another, that one must expect in the same order.

    Do not write to any of them before all works are complete.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # in every step each rank sends to another one, so that no rank is the target of all
    turns = [((rank - step) % size, (rank + step) % size) for step in range(1, size)]
    tensors = [x for source, target in turns for x in (*incoming[source], *outgoing[target])]
    if not tensors or not is_gloo(tensors[0], group):
        return _send_and_receive(outgoing, incoming, turns, group)
    works: list[dist.Work] = []
    _under_way[group.group_name].append(works)
    for source, target in turns:
        works += [group.recv([x], source, 0) for x in incoming[source]]
        works += [group.send([x], target, 0) for x in outgoing[target]]
    return works


def _send_and_receive(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Tensor]],
    turns: Sequence[tuple[int, int]],
    group: dist.ProcessGroup,
) -> Sequence[dist.Work]:
    """The same as one batch of messages, which NCCL needs so that no two ranks wait for each other."""
    messages = []
    for source, target in turns:
        messages += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in incoming[source]]
        messages += [dist.P2POp(dist.isend, x, group=group, group_peer=target) for x in outgoing[target]]
    return dist.batch_isend_irecv(messages) if messages else []


# Exchanges under way by group, in starting order; gloo completes them in that order. They are kept alive here, since
# gloo drops a message whose work is freed, and then every later message between the two ranks. Without this a kernel
# that raises between start and wait would break the group, although every rank may catch the error (Lightning's batch
# size finder does).
_under_way: defaultdict[str, list[Sequence[dist.Work]]] = defaultdict(list)


def all_to_all_sum(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start a :func:`reduce_scatter` made of an all-to-all; the wait sums the addends.

    Gloo's reduce-scatter runs an all-reduce, so every rank receives every sum. This sends half the bytes.
    """
    received = stacked.new_empty(stacked.shape)
    work = dist.all_to_all_single(received.view(-1), stacked.contiguous().view(-1), group=group, async_op=True)
    return Pending(received, [work], lambda addends: addends.sum(0))


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group that torch knows by ``name``, its ``group_name``."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def is_gloo(x: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether ``group`` sends ``x`` over gloo."""
    return x.is_cpu and "gloo" in str(dist.get_backend_config(group))
