"""Worker processes that stay alive between calls and form a process group for each.

Starting Python and importing torch takes seconds; a forkserver pays for it once. Every call meets afresh at its own
file, runs a module-level function ``fn(rank, *args)`` in each rank and returns the results by rank. A call that fails
or outlasts its timeout replaces all workers, so that no half-finished collective reaches the next call.
"""

import atexit
import gc
import logging
import multiprocessing as mp
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds
GRACE = 15.0  # seconds that the other ranks have to answer once one has failed


class WorkerError(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds the traceback of each rank that raised."""


class World:
    """Up to ``size`` ranks on this machine. Close it, or use it in a ``with`` statement.

    Args:
        size: the most ranks that a call may ask for.
        timeout: seconds that a call may take, unless it says otherwise.
        on_start: called with its rank in each new worker while that has one thread, for example to move it into a
            network namespace; it is pickled.
        preload: modules to import once for all workers, those of the process's later worlds included.
    """

    def __init__(
        self,
        size: int,
        timeout: float = TIMEOUT,
        on_start: Callable[[int], object] | None = None,
        preload: Sequence[str] = ("torch", "lightning_lss"),
    ) -> None:
        self.size, self.timeout, self._on_start = size, timeout, on_start
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._workers: list[tuple[Any, Any]] = []  # process, connection

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        threads: int = 1,
        group: bool = True,
    ) -> list[Any]:
        """Call ``fn(rank, *args)`` on ranks 0 to ``size`` - 1 and return the results by rank.

        Args:
            size: number of ranks.
            fn: a function at the top level of a module.
            *args: its further arguments, which are pickled.
            timeout: seconds for the call, and for a collective within it.
            threads: torch's threads of a rank.
            group: whether the ranks form a process group (gloo, and NCCL where every rank has a GPU) and have the
                environment of ranks that a launcher has started.

        Raises:
            WorkerError: if a rank raised, died, or did not answer in time. The next call gets new workers.
            ValueError: if ``size`` exceeds that of the world.
        """
        if size > self.size:
            raise ValueError(f"{size} ranks were asked of a world of {self.size}.")
        timeout = self.timeout if timeout is None else timeout
        self._start_missing()
        with tempfile.TemporaryDirectory() as folder:
            call = partial(_call, fn, args, size if group else 0, threads, f"{folder}/meeting", timeout)
            try:
                for _, connection in self._workers[:size]:
                    connection.send(call)
                return self._collect(size, timeout)
            except BaseException:  # an interrupt too: answers that are left would be taken for those of the next call
                self.close()
                raise

    def close(self) -> None:
        """End all workers. A later call starts new ones."""
        for worker, connection in self._workers:
            worker.kill()
            worker.join()
            connection.close()
        self._workers = []
        atexit.unregister(self.close)

    def _start_missing(self) -> None:
        if not all(worker.is_alive() for worker, _ in self._workers):
            self.close()
        if not self._workers:
            atexit.register(self.close)  # else Python waits at exit for workers that wait for calls
        while len(self._workers) < self.size:
            here, there = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(there, len(self._workers), self._on_start))
            worker.start()
            there.close()  # so that a worker's death is an end of file here
            self._workers.append((worker, here))

    def _collect(self, size: int, timeout: float) -> list[Any]:
        """The answers by rank. Once a rank has failed the others have :data:`GRACE` seconds to say why they do."""
        silent = {connection: rank for rank, (_, connection) in enumerate(self._workers[:size])}
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while silent:
            ready: list[Any] = wait(silent, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = silent.pop(connection)
                try:
                    fine, answer = connection.recv()
                except (EOFError, ConnectionError):
                    fine, answer = False, "The process died; perhaps the machine's memory does not suffice."
                (results if fine else errors)[rank] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                errors |= dict.fromkeys(silent.values(), "It did not answer in time.")
                break
        if errors:
            raise WorkerError("\n".join(f"rank {rank}:\n{errors[rank]}" for rank in sorted(errors)))
        return [results[rank] for rank in range(size)]


def _serve(connection: Any, rank: int, on_start: Callable[[int], object] | None) -> None:
    """Answer calls until the parent hangs up."""
    if on_start is not None:
        on_start(rank)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.freeze()  # what is imported already is not looked through after every call
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        except BaseException:  # a function or an argument that cannot be unpickled here
            connection.send((False, traceback.format_exc()))
            continue
        try:
            connection.send((True, call(rank)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _call(
    fn: Callable[..., Any], args: tuple[Any, ...], size: int, threads: int, meeting: str, timeout: float, rank: int
) -> Any:
    """Return ``fn(rank, *args)``, in a process group of ``size`` ranks that meet at a file; 0 for no group."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # or Lightning's DDP gives a process all cores
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if size:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))  # as a launcher tells Lightning
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= size else "gloo"
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
    result = fn(rank, *args)
    if size:
        dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # nothing of this call is in memory during the next
    return result
