"""Time attention alone, forward and backward, on S single-threaded ranks, and check its gradients."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contestants import CONTESTANTS, attention_module
from lightning_lss import SequenceShard, ShardedModule
from lightning_lss.testing.compare import worst_difference

RIGHT = 1e-4  # relative error in float32 up to which a gradient counts as right


class Shape(NamedTuple):
    """Sizes of one call: batch 1, ``length`` L, ``heads`` H, ``kv_heads`` G, head ``width`` D."""

    length: int
    heads: int
    kv_heads: int
    width: int
    causal: bool = True

    def tensors(self, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Draw random q, k, v and an upstream gradient for ``length`` positions, the same on every rank."""
        generator = torch.Generator().manual_seed(3)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(1, count, length, self.width) for count in heads]
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run_attention(rank: int, name: str, size: int, shape: Shape) -> float:
    """Time one forward and backward pass on this rank, in seconds; all ranks start together."""
    local = shape.length // size
    *leaves, grad = shape.tensors(local)
    for leaf in leaves:
        leaf.requires_grad_()
    attend = _attention(rank, name, size, shape.causal)
    if size > 1:
        dist.barrier()
    start = time.perf_counter()
    attend(*leaves).backward(grad)
    return time.perf_counter() - start


def check_attention(rank: int, name: str, size: int, shape: Shape) -> dict[str, float]:
    """Compute the relative errors of this rank's output and gradients against plain attention, in float32."""
    contestant = CONTESTANTS[name]
    shard = SequenceShard(rank, size, contestant.layout)
    *whole, grad = shape.tensors(shape.length)
    whole = [x.requires_grad_() for x in whole]
    gqa = shape.heads != shape.kv_heads
    expected = F.scaled_dot_product_attention(*whole, is_causal=shape.causal, enable_gqa=gqa)
    expected.backward(grad)
    leaves = [shard.split(x.detach(), 2).clone().requires_grad_() for x in whole]
    out = _attention(rank, name, size, shape.causal)(*leaves)
    out.backward(shard.split(grad, 2).contiguous())
    pairs = [(out, expected), *((leaf.grad, x.grad) for leaf, x in zip(leaves, whole))]
    named = zip(("out", "dq", "dk", "dv"), pairs)
    return {name: worst_difference([own], [shard.split(x, 2)]).error for name, (own, x) in named}


def verdict(error: float) -> str:
    """Return the entry of the column ``gradients``."""
    return "right" if error <= RIGHT else "wrong"


def _attention(rank: int, name: str, size: int, causal: bool) -> torch.nn.Module:
    contestant = CONTESTANTS[name]
    module = attention_module(contestant, causal)
    if size > 1:
        assert isinstance(module, ShardedModule)
        module.set_shard(SequenceShard(rank, size, contestant.layout, dist.group.WORLD))
    return module
