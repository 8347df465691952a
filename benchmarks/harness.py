"""Ranks as processes, and contestants that take turns.

Every contestant is run in the same worker processes, A B A B, so that whatever else the machine does meets them all
alike. Ratios are taken within a round and their median is quoted.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing as mp
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.network import Network

Result = TypeVar("Result")

TIMEOUT = 3600.0  # seconds for one call


def _serve(connection: Any, rank: int, network: Network | None) -> None:
    """Answer calls until the parent hangs up. Without a process group (``size`` 0) the function runs alone."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    if network is not None:
        network.enter(rank)
    while True:
        try:
            fn, args, size, threads, meeting, timeout = connection.recv()
        except EOFError:
            return
        try:
            torch.set_num_threads(threads)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # or Lightning's DDP gives a process all cores
            if size:
                _join(rank, size, meeting, timeout)
            result = fn(rank, *args)
            if size:
                dist.barrier()
                dist.destroy_process_group()
            gc.collect()  # nothing of this contestant is in memory when the next takes its turn
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _join(rank: int, size: int, meeting: Path, timeout: float) -> None:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))  # as a launcher would tell Lightning
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= size
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


class World:
    """Up to ``size`` worker processes, to be used in a ``with`` statement.

    Args:
        size: the most ranks that a call will take.
        network: the limited links to put between the ranks; None for the machine's own loopback.
    """

    def __init__(self, size: int, network: Network | None = None) -> None:
        self.size = size
        self._network = network
        self._workers: list[tuple[Any, Any]] = []

    def __enter__(self) -> World:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "lightning_lss", "benchmarks.training"])
        for rank in range(self.size):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(there, rank, self._network), daemon=True)
            worker.start()
            there.close()
            self._workers.append((worker, here))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker, connection in self._workers:
            connection.close()
            worker.kill()
            worker.join()
        self._workers = []

    def run(
        self,
        size: int,
        fn: Callable[..., Any],
        *args: Any,
        threads: int = 1,
        group: bool = True,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """Call ``fn(rank, *args)`` on ranks 0 to ``size`` - 1, with ``threads`` threads each; the results by rank.

        Args:
            size: number of ranks.
            fn: a function at the top level of a module.
            *args: its further arguments.
            threads: torch's threads of a rank.
            group: whether the ranks form a process group (gloo).
            timeout: seconds.

        Raises:
            RuntimeError: with a rank's traceback; the world cannot be used again.
        """
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in self._workers[:size]:
                connection.send((fn, args, size if group else 0, threads, Path(folder) / "meeting", timeout))
            deadline = time.monotonic() + timeout
            results: list[Any] = []
            while len(results) < size:
                results.append(self._answer(len(results), deadline))
        return results

    def _answer(self, rank: int, deadline: float) -> Any:
        connection = self._workers[rank][1]
        while not connection.poll(0.05):
            self._check_others(rank)
            if time.monotonic() > deadline:
                raise RuntimeError(f"Rank {rank} did not answer in time.")
        try:
            fine, result = connection.recv()
        except EOFError:
            raise RuntimeError(f"Rank {rank} died; perhaps the machine's memory does not suffice.") from None
        if not fine:
            raise RuntimeError(f"Rank {rank} failed:\n{result}")
        return result

    def _check_others(self, rank: int) -> None:
        """A rank that died leaves the others waiting."""
        for other, (worker, _) in enumerate(self._workers):
            if not worker.is_alive():
                raise RuntimeError(
                    f"Rank {other} died; perhaps the machine's memory does not suffice (saw {rank} wait)."
                )


def in_turn(
    contestants: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 1, most_seconds: float = math.inf
) -> dict[str, list[Result]]:
    """What every contestant gave in every round; in each round every contestant runs once, in order.

    Args:
        contestants: by name, a function that runs the contestant and returns its seconds, or more.
        rounds: how many rounds are kept.
        warm_up: how many rounds before them are thrown away.
        most_seconds: no round but the first begins when those that are kept have taken as long.
    """
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    start = math.inf
    for index in range(warm_up + rounds):
        if index > warm_up and time.perf_counter() - start > most_seconds:
            break
        if index == warm_up:
            start = time.perf_counter()
        for name, run in contestants.items():
            result = run()
            if index >= warm_up:
                found[name].append(result)
    return found


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))
