"""Ranks that stay alive, ranks that do not exist, and what is counted of them."""

import os
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.collectives import all_gather, reduce_scatter
from lightning_lss.testing.collectives import CollectiveCounter, Tally, describe, kinds, total_bytes
from lightning_lss.testing.fake_world import fake_world, recorded_ranks
from lightning_lss.testing.world import WorkerError, World


def describe_rank(rank: int, base: int) -> tuple[Any, ...]:
    grouped = dist.is_initialized()
    total = torch.tensor(base + rank)
    if grouped:
        dist.all_reduce(total)
    return os.getpid(), total.item(), torch.get_num_threads(), os.environ.get("WORLD_SIZE"), grouped


def test_workers_stay_alive_and_results_are_by_rank(world: World) -> None:
    first, again = world.run(2, describe_rank, 10), world.run(2, describe_rank, 20)
    assert [x[0] for x in first] == [x[0] for x in again]
    assert [x[1:] for x in first] == [(21, 1, "2", True)] * 2
    alone = world.run(2, describe_rank, 0, threads=2, group=False)
    assert [x[1:] for x in alone] == [(0, 2, None, False), (1, 2, None, False)]
    with pytest.raises(ValueError, match="9 ranks were asked of a world of 4"):
        world.run(9, describe_rank, 0)


def fail(rank: int, how: str) -> None:
    if how == "all" or rank == 1:
        if how == "death":
            os._exit(1)
        if how == "silence":
            time.sleep(60)
        raise ZeroDivisionError(f"of rank {rank}")


def test_failures_name_their_ranks_and_the_next_call_finds_new_workers() -> None:
    with World(2) as own:
        for how, seconds, words in [
            ("all", 60, r"(?s)rank 0:.*of rank 0.*rank 1:.*of rank 1"),
            ("death", 60, r"rank 1:\nThe process died"),
            ("silence", 3, r"rank 1:\nIt did not answer in time"),
        ]:
            before = own.run(2, describe_rank, 0)
            with pytest.raises(WorkerError, match=words):
                own.run(2, fail, how, group=False, timeout=seconds)
            after = own.run(2, describe_rank, 0)
            assert {x[0] for x in before}.isdisjoint(x[0] for x in after)


class UnknownThere:
    def __reduce__(self) -> Any:
        return fail, (1, "unpickled here")


class UnknownHereError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(threading.Lock())


def leave(rank: int, what: str) -> Any:
    if what == "raise":
        raise UnknownHereError(1, 2)
    if what == "exit":
        sys.exit("at once")
    return threading.Lock()


def test_what_cannot_be_pickled_is_an_error() -> None:
    with World(1) as own:
        with pytest.raises(Exception, match="pickle"):
            own.run(1, lambda rank: rank)
        with pytest.raises(WorkerError, match=r"rank 0:\n(?s:.*)ZeroDivisionError: of rank 1"):
            own.run(1, describe_rank, UnknownThere())
        for what, words in (
            ("return", "cannot pickle"),
            ("raise", "UnknownHereError"),
            ("exit", "SystemExit: at once"),
        ):
            with pytest.raises(WorkerError, match=rf"rank 0:\n(?s:.*){words}"):
                own.run(1, leave, what)


def wait_for_the_other(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(60)


def test_ranks_within_a_collective_are_ended_too() -> None:
    with World(2) as own:
        first = own.run(2, describe_rank, 0)
        with pytest.raises(WorkerError, match="rank 1:\nIt did not answer in time"):  # rank 0 may be told by gloo first
            own.run(2, wait_for_the_other, timeout=2)
        for pid, *_ in first:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def die_after_the_call(rank: int) -> None:
    threading.Timer(0.2, lambda: os._exit(1)).start()


def test_a_worker_that_dies_between_calls_is_replaced() -> None:
    with World(2) as own:
        own.run(2, die_after_the_call, group=False)
        time.sleep(1)
        assert [x[1] for x in own.run(2, describe_rank, 0)] == [1, 1]


def count(rank: int) -> Tally:
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with CollectiveCounter() as counter:
        all_gather(x, dist.group.WORLD).wait()
        counter.phase = "backward"
        reduce_scatter(x, dist.group.WORLD).wait()
        dist.all_reduce(torch.ones(4))
        dist.broadcast(torch.ones(4), 0)
    return counter.tally


def test_collectives_are_counted_by_phase_kind_dtype_and_bytes(world: World) -> None:
    for tally in world.run(2, count):
        assert sorted(map(str, tally.elements())) == sorted(
            [
                "Collective(phase='forward', kind='all_gather', dtype=torch.bfloat16, received=16)",
                "Collective(phase='backward', kind='reduce_scatter', dtype=torch.bfloat16, received=8)",
                "Collective(phase='backward', kind='all_reduce', dtype=torch.float32, received=16)",
                "Collective(phase='backward', kind='broadcast', dtype=torch.float32, received=16)",
            ]
        )
        assert kinds(tally, "forward") == {"all_gather": 1}
        assert total_bytes(tally, "backward") == 40
        assert describe(tally, "backward") == "1 all_reduce + 1 broadcast + 1 reduce_scatter"


def test_a_fake_world_has_one_rank_of_many() -> None:
    with fake_world(7, 1000) as group:
        assert (dist.get_rank(group), dist.get_world_size(group)) == (7, 1000)
    assert not dist.is_initialized()


@pytest.mark.parametrize("late", [False, True])
def test_recorded_ranks_have_what_the_others_sent(late) -> None:
    def work(shard: Any) -> tuple[Tensor, Tensor]:
        own = torch.full((2,), shard.rank + 1.0)
        gathered = all_gather(own, shard.group).wait()
        return gathered, reduce_scatter(gathered * own[0], shard.group).wait()

    for rank, (gathered, scattered) in enumerate(recorded_ranks(work, 3, "contiguous", late)):
        assert gathered[:, 0].tolist() == [1, 2, 3]
        assert scattered.tolist() == [6.0 * (rank + 1)] * 2


def test_late_collectives_show_a_buffer_that_is_used_too_early() -> None:
    def overwritten(shard: Any) -> Tensor:
        own = torch.full((2,), shard.rank + 1.0)
        pending = all_gather(own, shard.group)
        own.zero_()
        return pending.wait()

    def read(shard: Any) -> Tensor:
        pending = all_gather(torch.ones(2), shard.group)
        early = pending.tensor.clone()
        pending.wait()
        return early

    for late, right in ((False, True), (True, False)):
        first = recorded_ranks(overwritten, 2, "contiguous", late)[0]
        assert (first.tolist() == [[1, 1], [2, 2]]) == right
        assert recorded_ranks(read, 2, "contiguous", late)[0].isfinite().all().item() == right
