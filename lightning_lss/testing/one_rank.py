"""One rank of S on one device: its real kernels and its real memory, with copies in the place of collectives.

torch's fake process group makes this process rank 0 of S without any other. Its reduce-scatter reads only one of the S
parts that a real one reads, and it runs on the stream of the computation. So the collectives of
:mod:`lightning_lss.sequence.collectives` are replaced here: on a stream of their own they read and write as many bytes
of the device's memory as real ones (an all-gather writes S times the local tensor, a reduce-scatter reads S times and
writes once). What real ones add is the time on the links, and waiting for the slowest rank.

Numbers that come out are those of S ranks that all hold the same segment. They are finite, and mean nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lightning_lss import SequenceShard
from lightning_lss.testing.fake_world import Work, fake_world, replaced_collectives

GATHER, SCATTER = "copy for all-gather", "copy for reduce-scatter"  # in traces


class Copies:
    """The two collectives as copies of tensors on ``device``, on CUDA in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def all_gather(self, out: Tensor, local: Tensor, group: dist.ProcessGroup, async_op: bool) -> Work:
        """``local`` [n] into every slot of ``out`` [S n]; it may lie in one of them."""
        slots = out.view(-1, local.numel())
        own = (local.data_ptr() - out.data_ptr()) // local.nbytes  # of no slot where it lies elsewhere

        def copy() -> None:
            for others in (slots[:own], slots[own + 1 :]) if 0 <= own < len(slots) else (slots,):
                others.copy_(local)

        return self._start(GATHER, copy, out, local)

    def reduce_scatter(self, out: Tensor, stacked: Tensor, group: dist.ProcessGroup, async_op: bool) -> Work:
        """The sum of the S parts of ``stacked`` [S n] into ``out`` [n]."""
        return self._start(SCATTER, lambda: torch.sum(stacked.view(-1, out.numel()), 0, out=out), out, stacked)

    def _start(self, name: str, copy: Callable[[], Any], *tensors: Tensor) -> Work:
        with record_function(name):
            if self._stream is None:
                copy()
                return Work()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                copy()
                event = self._stream.record_event()
            return Work(lambda: torch.cuda.current_stream().wait_event(event), *tensors)


@contextmanager
def one_rank_of(size: int, device: torch.device) -> Iterator[None]:
    """Within, this process is rank 0 of a world of ``size``, and the collectives of attention are copies."""
    copies = Copies(device)
    with fake_world(0, size), replaced_collectives(copies.all_gather, copies.reduce_scatter):
        yield


def shard_of(size: int, layout: str = "zigzag") -> SequenceShard:
    """The shard with the most work: all have the same in zigzag, the last has in contiguous. For :func:`one_rank_of`."""
    if size == 1:
        return SequenceShard()
    return SequenceShard(0 if layout == "zigzag" else size - 1, size, layout, dist.group.WORLD)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
