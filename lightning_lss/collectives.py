"""The two collectives of the LSS Transformer, each with its group given explicitly and a handle to wait on.

``torch`` 2.13 renamed ``all_gather_into_tensor`` and ``reduce_scatter_tensor`` and deprecated the old names, which are
the only ones in 2.11: the module takes whichever is there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(NamedTuple):
    """A tensor that a collective is still filling."""

    tensor: Tensor
    work: dist.Work | None
    addends: bool = False
    """Whether the tensor is the addends of a sum, stacked along dimension 0."""

    def wait(self) -> Tensor:
        """Block (on CUDA: the current stream) until the tensor is complete, and return it, or its sum."""
        if self.work is not None:
            self.work.wait()
        return self.tensor.sum(0) if self.addends else self.tensor


def all_gather(local: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> Pending:
    """Start to gather ``local``, of one shape on every rank of ``group``, into ``[size, *local.shape]`` by rank, which
    is ``out`` where that is given."""
    gathered = local.new_empty((dist.get_world_size(group), *local.shape)) if out is None else out
    whole, own = gathered.view(-1), local.contiguous().view(-1)
    if _is_gloo(own, group):
        return Pending(gathered, group.allgather_into_tensor_coalesced([whole], [own]))
    return Pending(gathered, _all_gather(whole, own, group=group, async_op=True))


def reduce_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start to sum ``stacked`` ``[size, *shape]`` over ``group``; rank ``r`` receives entry ``r`` of the sum.

    The adjoint of :func:`all_gather`. ``stacked`` must not be written to before the result has been waited for.
    """
    local = stacked.new_empty(stacked.shape[1:])
    own, whole = local.view(-1), stacked.contiguous().view(-1)
    if _is_gloo(own, group):
        return Pending(local, group.reduce_scatter_tensor_coalesced([own], [whole]))
    return Pending(local, _reduce_scatter(own, whole, group=group, async_op=True))


def exchange_and_sum(stacked: Tensor, group: dist.ProcessGroup) -> Pending:
    """:func:`reduce_scatter` in the quickest way that the backend of ``group`` has, for up to the memory of ``stacked``.

    Gloo's reduce-scatter is an all-reduce inside: every rank receives every sum. There an all-to-all brings a rank the
    addends of its own sum and no more, half the bytes, and they are added when they are waited for.
    """
    if not _is_gloo(stacked, group):
        return reduce_scatter(stacked, group)
    received = stacked.new_empty(stacked.shape)
    work = dist.all_to_all_single(received.view(-1), stacked.contiguous().view(-1), group=group, async_op=True)
    return Pending(received, work, addends=True)


def _is_gloo(x: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether gloo carries ``x``. Its plain collectives pass through flat copies of their own, rank by rank; its
    coalesced ones, here of a single tensor, do not, and take half (gather) or three quarters (scatter) of the time."""
    return x.is_cpu and "gloo" in str(dist.get_backend_config(group))
