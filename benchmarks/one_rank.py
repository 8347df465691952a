"""Run and time one rank of S on one device under the Trainer; see :func:`lightning_lss.testing.fake_world.one_rank_of`."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor


class OneOfMany(LightningEnvironment):
    """Tell Lightning that this process is the first of ``size`` launched machines of one device each."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    @property
    def creates_processes_externally(self) -> bool:
        """Tell that all processes are launched."""
        return True

    def world_size(self) -> int:
        """Return S."""
        return self._size

    def node_rank(self) -> int:
        """Return 0, the first."""
        return 0


def copy_bucket(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """Copy the bucket of gradients there and back: a communication hook of DistributedDataParallel."""
    buffer = bucket.buffer()
    buffer.copy_(buffer.clone())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future


class Timed(NamedTuple):
    """Time and memory of one forward and backward pass."""

    forward: float
    """Seconds."""
    backward: float
    """Seconds."""
    peak: int
    """Bytes on the device at the peak, beyond those before; 0 on CPU."""

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward


def time_call(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Timed:
    """Time ``attend(q, k, v)`` and its backward pass with the gradient ``grad`` of the output."""
    device = q.device
    synchronize = partial(torch.get_device_module(device).synchronize, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    synchronize()
    start = time.perf_counter()
    out = attend(*leaves)
    synchronize()
    middle = time.perf_counter()
    out.backward(grad)
    synchronize()
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return Timed(middle - start, end - middle, peak)
