"""Worlds of many ranks in one process.

:func:`fake_world` is torch's: this process is one rank, and the others do not exist. :func:`one_rank_of` gives that rank
the real work and memory of its collectives, :func:`recorded_ranks` lets it be every rank in turn.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lightning_lss.sequence import collectives
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.segment import SequenceShard

GATHER, SCATTER = "copy for all-gather", "copy for reduce-scatter"  # of one_rank_of, in traces


@contextmanager
def fake_world(rank: int, size: int, like_gloo: bool = False) -> Iterator[dist.ProcessGroup]:
    """Make this process ``rank`` of ``size``. Collectives return at once, and leave outputs as they are or fill them with
    what this rank sends.

    With ``like_gloo`` the backend is called as if it were gloo, so that what is sent is what gloo would be given.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

    backend = "fake_gloo" if like_gloo else "fake"
    if backend not in dist.Backend.backend_list:
        dist.Backend.register_backend(backend, _create_fake_pg, extended_api=True, devices=["cpu"])
    with patch.object(sys, "excepthook", sys.excepthook):  # torch's puts the rank before every line of a traceback
        dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=size)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()


@contextmanager
def one_rank_of(size: int, device: torch.device) -> Iterator[None]:
    """Make this process rank 0 of ``size`` on ``device``, with the kernels and the memory of a real one.

    Attention's collectives are copies, on CUDA in a stream of their own. They read and write as many bytes of memory as
    real ones: an all-gather writes S times the local tensor, a reduce-scatter reads S times and writes once. (Torch's
    fake one reads once, on the stream of the computation.) What real ones add is the time on the links, and waiting for
    the slowest rank. Numbers that come out are those of S ranks that hold the same segment: finite, and no more.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(name: str, copy: Callable[[], object], *tensors: Tensor) -> _Work:
        with record_function(name):
            if stream is None:
                copy()
                return _Work()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                copy()
                return _Work(stream.record_event().wait, *tensors)

    def all_gather(out: Tensor, local: Tensor, **_: Any) -> _Work:
        slots = out.view(size, -1)
        own = (local.data_ptr() - out.data_ptr()) // local.nbytes  # of no slot where it lies elsewhere

        def copy() -> None:
            for others in (slots[:own], slots[own + 1 :]) if 0 <= own < size else (slots,):
                others.copy_(local)

        return start(GATHER, copy, out, local)

    def reduce_scatter(out: Tensor, stacked: Tensor, **_: Any) -> _Work:
        return start(SCATTER, partial(torch.sum, stacked.view(size, -1), 0, out=out), out, stacked)

    with fake_world(0, size), patch.multiple(collectives, _all_gather=all_gather, _reduce_scatter=reduce_scatter):
        yield


def shard_of(size: int, layout: str = "zigzag") -> SequenceShard:
    """Return the shard with the most work, for :func:`one_rank_of`: in contiguous the last, in zigzag all have the same."""
    return SequenceShard(0 if layout == "zigzag" else size - 1, size, layout, dist.group.WORLD)


Payload = Sequence[Sequence[Tensor]]
"""What a rank sends in one collective; of messages, what it sends to each rank."""

RUNS = 3  # of one layer of attention, until every result is right


def recorded_ranks(
    work: Callable[[SequenceShard], Any],
    size: int,
    layout: str,
    late: bool = False,
    assignment: ChunkAssignment | None = None,
) -> list[Any]:
    """Return what ``work(shard)`` returns on each of ``size`` ranks, which take turns on one device; the layout
    ``balanced`` needs an ``assignment``.

    The work is run several times and must do the same each time. What a rank sends in the n-th collective of a run is
    written down; in the next run the n-th collective gives every rank what all of them sent in the run before (in the
    first, zeros). Keys and values do not depend on what is received, so they are right from the second run on, their
    gradients from the third.

    With ``late`` a collective reads its input only when it is waited for, and until then its output is NaN, except for
    the rank's own part. A buffer that is written or read too early then gives wrong results every time.
    """
    sent: list[list[Payload]] = [[]] * size  # by rank and collective
    results: list[Any] = []

    def start(outputs: Sequence[Tensor], own: Payload, values: Callable[[list[Payload]], Sequence[Tensor]]) -> _Work:
        sent_now, index = sent[rank], len(sent[rank])
        sent_now.append(own)

        def finish() -> None:
            sent_now[index] = [[x.clone() for x in tensors] for tensors in own]
            nothing = [x.new_zeros(()) for x in outputs]  # in the first run nobody has sent anything yet
            received = values([x[index] for x in before]) if before[0] else nothing
            for output, value in zip(outputs, received, strict=True):
                output.copy_(value)

        if not late:
            finish()
            return _Work()
        kept = {x.data_ptr() for tensors in own for x in tensors}
        for output in outputs:
            if output.data_ptr() not in kept:
                output.fill_(torch.nan)
        return _Work(finish)

    def all_gather(out: Tensor, local: Tensor, **_: Any) -> _Work:
        return start(out.view(size, -1).unbind(), [[local]], lambda parts: [own for ((own,),) in parts])

    def reduce_scatter(out: Tensor, stacked: Tensor, **_: Any) -> _Work:
        def values(parts: list[Payload]) -> list[Tensor]:
            return [torch.stack([own for ((own,),) in parts]).view(size, size, -1)[:, rank].sum(0)]

        return start([out], [[stacked]], values)

    def send_and_receive(outgoing: Payload, incoming: Payload, *_: Any) -> list[_Work]:
        me, others = rank, [other for other in range(size) if other != rank]
        outputs = [x for other in others for x in incoming[other]]
        return [start(outputs, outgoing, lambda parts: [x for other in others for x in parts[other][me]])]

    with (
        fake_world(0, size) as group,
        patch.multiple(
            collectives, _all_gather=all_gather, _reduce_scatter=reduce_scatter, _send_and_receive=send_and_receive
        ),
    ):
        for _ in range(RUNS):
            before, sent, results = sent, [[] for _ in range(size)], []
            for rank in range(size):
                results.append(work(SequenceShard(rank, size, layout, group, assignment=assignment)))
    return results


class _Work:
    """A handle like torch's. The first wait calls ``finish``; tensors are kept until then, as NCCL's handles do."""

    def __init__(self, finish: Callable[[], object] = lambda: None, *tensors: Tensor) -> None:
        self._rest = [(finish, tensors)]

    def wait(self) -> bool:
        while self._rest:
            self._rest.pop()[0]()
        return True
