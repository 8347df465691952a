"""Time the attention of one rank of S against plain attention, for :mod:`benchmarks.gpu`."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.one_rank import Timed, time_call
from benchmarks.turns import in_turn
from lightning_lss import AttentionMask, lss_attention
from lightning_lss.testing.fake_world import shard_of

BACKENDS = {
    "cuda_flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cpu_flash": SDPBackend.FLASH_ATTENTION,
}
"""Names of kernels in torch's own attention."""
CONTEXT_PARALLEL = "context-parallel"
"""Name of the contestant for torch's own ``context_parallel``. It has no kernel for CPU."""


@dataclass(frozen=True)
class Call:
    """Sizes of one call of attention: batch 1, L positions, H query and G key/value heads of width D."""

    length: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def tensors(self, local_length: int) -> list[Tensor]:
        """Draw q, k, v and the output's gradient, as projections leave them: [1, H, l, D], in memory [1, l, H, D]."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(1, local_length, count, self.width) for count in heads]
        return [torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for shape in shapes]

    def flops(self, pairs: float) -> float:
        """Count the operations of forward and backward: 2 and 5 matrix multiplications.

        Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
        """
        return 14.0 * self.heads * self.width * pairs


def time_rank(call: Call, size: int, kernel: str, layout: str, head_chunks: Any) -> Timed:
    """Time the attention of one rank of S."""
    attend = partial(lss_attention, shard=shard_of(size, layout), kernel=kernel, head_chunks=head_chunks)
    return time_call(attend, *call.tensors(call.length // size))


def time_plain(call: Call, kernel: str) -> Timed:
    """Time torch's own attention on a whole sequence."""
    return time_call(partial(_attend, call, kernel), *call.tensors(call.length))


def time_context_parallel(call: Call, size: int, kernel: str) -> Timed:
    """Time the attention of one rank of S with torch's own ``context_parallel`` and its defaults: balanced (the zigzag
    layout), keys and values gathered. torch's fake process group copies instead of communicating, on the stream of the
    computation. The backward pass has to run within the context too.
    """
    from torch.distributed.tensor.experimental import context_parallel  # a prototype: nothing else may depend on it

    mesh = DeviceMesh.from_group(dist.group.WORLD, call.device.type)
    whole = torch.empty(call.length, device=call.device)  # the context balances only if it has a buffer to split
    with context_parallel(mesh, buffers=[whole], buffer_seq_dims=[0]):
        return time_call(partial(_attend, call, kernel), *call.tensors(call.length // size))


def _attend(call: Call, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gqa = call.heads != call.kv_heads
    with sdpa_kernel(BACKENDS.get(kernel, SDPBackend.MATH)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


def compare(
    call: Call, size: int, kernel: str, contestants: dict[str, dict[str, Any]], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measure the contestants' rows, and plain attention with as many pairs as the first of them.

    Args:
        call: sizes.
        size: S; the caller is within :func:`lightning_lss.testing.fake_world.one_rank_of`.
        kernel: kernel of all contestants.
        contestants: by name, their ``layout`` and, if they are LSS, ``head_chunks``.
        rounds: turns of every contestant after a warm-up.
        seconds: time after which no further round begins.
    """
    shards = {name: shard_of(size, own["layout"]) for name, own in contestants.items()}
    pairs = {name: AttentionMask.causal().plan(call.length, shard).pairs for name, shard in shards.items()}
    whole = replace(call, length=max(128, round(math.sqrt(2 * next(iter(pairs.values()))) / 128) * 128))
    pairs["plain"] = AttentionMask.causal().plan(whole.length).pairs
    runs: dict[str, Callable[[], Timed]] = {"plain": partial(time_plain, whole, kernel)}
    for name, own in contestants.items():
        torchs = name == CONTEXT_PARALLEL
        runs[name] = partial(time_context_parallel if torchs else partial(time_rank, **own), call, size, kernel)
    times = in_turn(runs, rounds, most_seconds=seconds)
    for name, own_times in times.items():
        own = contestants.get(name, {})
        per_pair = [[x.seconds / pairs[which] for x in times[which]] for which in ("plain", name)]
        seconds = statistics.median(x.seconds for x in own_times)
        yield {
            "contestant": name,
            "ranks": size if own else 1,
            "length": call.length if own else whole.length,
            "layout": own.get("layout", ""),
            "heads": call.heads,
            "kv_heads": call.kv_heads,
            "head_width": call.width,
            "dtype": str(call.dtype).removeprefix("torch."),
            "kernel": kernel,
            "head_chunks": own.get("head_chunks", ""),
            "collectives": "copies" if own else "",
            "forward_seconds": statistics.median(x.forward for x in own_times),
            "backward_seconds": statistics.median(x.backward for x in own_times),
            "seconds": seconds,
            "fraction_of_plain": statistics.median(a / b for a, b in zip(*per_pair)),
            "tflops_per_second": call.flops(pairs[name]) / seconds / 1e12,
            "peak_mib": max(x.peak for x in own_times) / 2**20,
            "rounds": len(own_times),
        }
