"""Worlds of many ranks in one process: the other ranks do not exist."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence import collectives

_GLOO = "fake_gloo"


@contextmanager
def fake_world(rank: int, size: int, like_gloo: bool = False) -> Iterator[dist.ProcessGroup]:
    """A process group in which this process is ``rank`` of ``size`` and the others do not exist: collectives return at once,
    and leave outputs as they are or fill them with what this rank sends.

    Args:
        rank: this process.
        size: number of ranks.
        like_gloo: whether the backend is called as if it were gloo, so that what is sent is what gloo would be given.

    Raises:
        ValueError: if this process is in a process group already (torch's own error).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

    if like_gloo and _GLOO not in dist.Backend.backend_list:
        dist.Backend.register_backend(_GLOO, _create_fake_pg, extended_api=True, devices=["cpu"])
    backend = _GLOO if like_gloo else "fake"
    excepthook = sys.excepthook  # torch puts the rank before every line of a traceback, and leaves it at that
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook


class Work:
    """A handle of torch's. The first wait calls ``finish``; tensors are kept until then, as NCCL's handles do."""

    def __init__(self, finish: Callable[[], object] = lambda: None, *tensors: Tensor) -> None:
        self._rest = finish, tensors

    def wait(self) -> bool:
        """Let the collective be complete."""
        self._rest[0]()
        self._rest = (lambda: None), ()
        return True


@contextmanager
def replaced_collectives(all_gather: Callable[..., Any], reduce_scatter: Callable[..., Any]) -> Iterator[None]:
    """Within, :mod:`lightning_lss.sequence.collectives` calls these two in the place of torch's.

    Groups of gloo are not affected; within a :func:`fake_world` everything is.

    Args:
        all_gather: called as ``all_gather(out, local, group=..., async_op=True)`` with tensors [S n] and [n]; returns a
            :class:`Work`.
        reduce_scatter: called as ``reduce_scatter(out, stacked, group=..., async_op=True)`` with [n] and [S n]; so too.
    """
    with patch.multiple(collectives, _all_gather=all_gather, _reduce_scatter=reduce_scatter):
        yield
