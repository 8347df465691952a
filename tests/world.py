"""Worker processes that stay alive between tests and form a process group for each call.

Starting Python and importing torch takes seconds; a forkserver pays for it once. Every call meets afresh at its own
file, runs a module-level function ``fn(rank, *args)`` in each rank and returns the results by rank. A call that fails
or outlasts its timeout replaces all workers, so that no half-finished collective reaches the next test.
"""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # seconds


class WorkerError(AssertionError):
    """A rank raised; the message holds its traceback."""


def _serve(connection: Any, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            fn, args, size, meeting, timeout = connection.recv()
        except EOFError:  # the test session is gone
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
            result = fn(rank, *args)
            dist.barrier()
            dist.destroy_process_group()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class World:
    """Up to ``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "lightning_lss"])
        self._workers: list[tuple[Any, Any]] = []

    def run(self, size: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call ``fn(rank, *args)`` on ``size`` ranks of one gloo group; return what each returned."""
        while len(self._workers) < self.size:
            here, there = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(there, len(self._workers)))
            worker.start()
            self._workers.append((worker, here))
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in self._workers[:size]:
                connection.send((fn, args, size, Path(folder) / "meeting", timeout))
            return self._collect(size, timeout)

    def _collect(self, size: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results, errors = [], []
        for rank, (_, connection) in enumerate(self._workers[:size]):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                errors.append(f"rank {rank} did not answer within {timeout} s")
                continue
            try:
                fine, result = connection.recv()
            except EOFError:
                fine, result = False, "the process died"
            (results if fine else errors).append(result if fine else f"rank {rank}:\n{result}")
        if errors:
            self.close()
            raise WorkerError("\n".join(errors))
        return results

    def close(self) -> None:
        """End all workers."""
        for worker, _ in self._workers:
            worker.kill()
            worker.join()
        self._workers = []
