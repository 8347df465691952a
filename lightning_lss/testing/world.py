"""Worker processes that stay alive between calls and form a process group for each.

Starting Python and importing torch takes seconds; a forkserver pays for it once. A call that fails or outlasts its
timeout replaces all workers, so that no half-finished collective reaches the next call.
"""

import atexit
import gc
import logging
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

GRACE = 15.0  # seconds that the other ranks have to answer once one has failed


class WorkerError(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds the traceback of each rank that raised."""


class World(ExitStack):
    """Up to ``size`` ranks on this machine. ``close()`` ends their processes, as does the end of a ``with`` statement.

    ``timeout`` is the seconds that a call may take, unless it says otherwise. ``on_start(rank)`` runs in each new worker
    while that has one thread, for example to move it into a network namespace. The modules in ``preload`` are imported
    once for all workers, those of the process's later worlds included.
    """

    def __init__(
        self,
        size: int,
        timeout: float = 60.0,
        on_start: Callable[[int], object] | None = None,
        preload: Sequence[str] = ("torch", "lightning_lss"),
    ) -> None:
        super().__init__()
        self.size, self.timeout, self._on_start = size, timeout, on_start
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._workers: list[tuple[Any, Any]] = []  # process, connection
        atexit.register(self.close)  # else Python waits at exit for workers that wait for calls

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

        ``fn`` is a function at the top level of a module; its arguments are pickled. ``timeout`` is the seconds for the
        call and for a collective within it. ``threads`` are torch's in each rank. With ``group`` the ranks form a process
        group (gloo, and NCCL where every rank has a GPU) and have the environment that a launcher gives to ranks.

        Raises ``ValueError`` if ``size`` exceeds that of the world, ``WorkerError`` if a rank raised, died or did not
        answer in time. The next call then gets new workers.
        """
        if size > self.size:
            raise ValueError(f"{size} ranks were asked of a world of {self.size}.")
        timeout = self.timeout if timeout is None else timeout
        try:
            if sum(worker.is_alive() for worker, _ in self._workers) < self.size:
                self._start_workers()
            with tempfile.TemporaryDirectory() as folder:
                call = pickle.dumps((fn, args, size if group else 0, threads, f"{folder}/meeting", timeout))
                for _, connection in self._workers[:size]:
                    connection.send_bytes(call)
                return self._collect(size, timeout)
        except BaseException:  # an interrupt too: answers that are left would be taken for those of the next call
            self.close()
            raise

    def _start_workers(self) -> None:
        self.close()
        self.callback(self._workers.clear)
        for rank in range(self.size):
            here, there = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(there, rank, self._on_start))
            worker.start()
            there.close()  # so that a worker's death is an end of file here
            self._workers.append((worker, here))
            for step in (here.close, worker.join, worker.kill):  # the last comes first
                self.callback(step)

    def _collect(self, size: int, timeout: float) -> list[Any]:
        """Return the results by rank. Once a rank has failed the others have :data:`GRACE` seconds to say why they do."""
        silent = {connection: rank for rank, (_, connection) in enumerate(self._workers[:size])}
        deadline = time.monotonic() + timeout
        answers: list[Any] = [(None, "It did not answer in time.")] * size
        while silent and (ready := wait(silent, max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = silent.pop(connection)
                try:
                    answers[rank] = pickle.loads(self._workers[rank][1].recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = None, "The process died; perhaps the machine's memory does not suffice."
                if answers[rank][1]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors := [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]:
            raise WorkerError("\n".join(errors))
        return [result for result, _ in answers]


def _serve(connection: Any, rank: int, on_start: Callable[[int], object] | None) -> None:
    """Answer calls until the parent hangs up."""
    if on_start is not None:
        on_start(rank)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.freeze()  # what is imported already is not looked through after every call
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send_bytes(_answer(rank, connection.recv_bytes()))


def _answer(rank: int, call: bytes) -> bytes:
    """Pickle what the call returns and no error, or nothing and the traceback."""
    try:
        fn, args, size, threads, meeting, timeout = pickle.loads(call)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Lightning's DDP gives a process all cores
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        if size:  # ranks that meet at a file, in the environment that a launcher makes for Lightning
            os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(size))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= size else "gloo"
            limit = timedelta(seconds=timeout)
            dist.init_process_group(backend, f"file://{meeting}", limit, size, rank)
        result = fn(rank, *args)
        if size:
            dist.barrier()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # nothing of this call is in memory during the next
        return pickle.dumps((result, None))
    except BaseException:
        return pickle.dumps((None, traceback.format_exc()))
