"""Contestants: ways to train one and the same :class:`~lightning_lss.LSSTransformer` on a long sequence.

A contestant is data; :mod:`benchmarks.training` trains with it and :mod:`benchmarks.attention` times its attention
alone.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_lss import LSSAttention, LSSStrategy, SequenceShard, ShardedModule


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Args:
        strategy: ``"lss"``, ``"megatron"``, ``"ddp"``, or ``"single"``, one process that holds the whole sequence.
        layout: layout of the segments, for ``"lss"``.
        attention: name of a module to replace :class:`~lightning_lss.LSSAttention`; None keeps it.
        model: arguments of :class:`~lightning_lss.LSSTransformer` that differ.
        options: further arguments of the strategy.
        package: a package that must be installed.
    """

    strategy: str = "lss"
    layout: str = "zigzag"
    attention: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    package: str | None = None

    @property
    def splits_sequence(self) -> bool:
        """Tell whether each rank has a segment, so that attention alone can be timed."""
        return self.strategy == "lss"

    def obstacle(self, size: int, heads: int, kv_heads: int) -> str | None:
        """Return why it cannot take part with ``size`` ranks, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed: pip install -e '.[benchmarks]'"
        if self.strategy == "megatron" and importlib.util.find_spec("lightning_lss.megatron.parallelize") is None:
            return "lightning_lss has no module megatron"
        if self.attention == "ulysses" and (heads % size or kv_heads % size):
            return f"{kv_heads} of {heads} heads cannot be divided evenly among {size} ranks"
        if self.strategy == "megatron" and heads % size:
            return f"{heads} heads cannot be divided evenly among {size} ranks"
        if kv_heads % self.model.get("head_chunks", 1):
            return f"{kv_heads} key/value heads cannot be divided evenly among {self.model['head_chunks']} head chunks"
        unknown = set(self.options) - set(signature(LSSStrategy).parameters)
        if unknown:
            return f"LSSStrategy does not take {', '.join(sorted(unknown))}"
        return None


CONTESTANTS: dict[str, Contestant] = {
    "single": Contestant("single"),
    "ddp": Contestant("ddp"),
    "lss": Contestant(),
    "lss-kept": Contestant(model={"keep_gathered": True}),
    "lss-1chunk": Contestant(model={"head_chunks": 1}),
    "lss-2chunks": Contestant(model={"head_chunks": 2}),
    "lss-8chunks": Contestant(model={"head_chunks": 8}),
    "lss-contiguous": Contestant(layout="contiguous"),
    "lss-fsdp": Contestant(options={"sharding": "fsdp"}),
    "megatron": Contestant("megatron"),
    "ring": Contestant(layout="contiguous", attention="ring", package="ring_attention_pytorch"),
    "ring-zigzag": Contestant(attention="ring-zigzag", package="ring_attention_pytorch"),
    "ulysses": Contestant(layout="contiguous", attention="ulysses"),
}


def attention_module(contestant: Contestant, causal: bool) -> nn.Module:
    """Build the attention of a contestant that splits sequences: ``forward(q, k, v)`` on [B, H, l, D], [B, G, l, D]."""
    if contestant.attention is not None:
        return ATTENTION[contestant.attention](causal)
    return LSSAttention(causal, **contestant.model)


def _forget_ranks() -> None:
    """Clear the first rank and world size, which the package remembers: a worker serves worlds of several sizes."""
    from ring_attention_pytorch import distributed

    distributed.get_rank.cache_clear()
    distributed.get_world_size.cache_clear()


def _interleaved(x: Tensor, groups: int) -> Tensor:
    """Reorder query heads so that head h belongs to key/value head h mod G, as the package pairs them."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class RingAttention(ShardedModule):
    """Ring attention (arXiv 2310.01889) as the package ring-attention-pytorch computes it on CPU; contiguous layout.

    Keys and values are sent around the ring in point-to-point messages. In version 0.5.20 the gradients of keys and
    values are wrong: the backward pass takes the pair (received, sent) of its last message for them.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        _forget_ranks()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, l, D], [B, G, l, D], [B, G, l, D] -> [B, H, l, D]."""
        from ring_attention_pytorch import ring_flash_attn

        rows = [x.transpose(1, 2).contiguous() for x in (_interleaved(q, k.size(1)), k, v)]  # [B, l, H, D]
        size = self.shard.size
        out = ring_flash_attn(*rows, causal=self.causal, ring_reduce_col=size > 1, ring_size=size)
        return _interleaved(out.transpose(1, 2), q.size(1) // k.size(1))


class RingZigzagAttention(ShardedModule):
    """The same package's zigzag attention: gathers keys and values, and runs torch's kernel with a mask.

    In version 0.5.20 the gradients of keys and values are wrong: the adjoint of its gather is a slice of this rank's
    own gradient, without those of the others.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        _forget_ranks()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, l, D], [B, G, l, D], [B, G, l, D] -> [B, H, l, D]."""
        from ring_attention_pytorch.zig_zag_attention import zig_zag_attn

        local, size, layout = q.size(2), self.shard.size, self.shard.layout
        own = self.shard.positions(local, q.device)
        ranks = [SequenceShard(rank, size, layout) for rank in range(size)]
        others = torch.cat([shard.positions(local, q.device) for shard in ranks])  # gathered by rank, not by position
        mask = own[:, None] >= others if self.causal else None
        out = zig_zag_attn(_interleaved(q, k.size(1)), k, v, attn_mask=mask)
        return _interleaved(out, q.size(1) // k.size(1))


class UlyssesAttention(ShardedModule):
    """Ulysses (arXiv 2309.14509): all-to-all from segments to heads, the plain kernel, and back; contiguous layout."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, l, D], [B, G, l, D], [B, G, l, D] -> [B, H, l, D]; S divides G."""
        gqa = q.size(1) != k.size(1)
        if self.shard.size == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=gqa)
        whole = [_Exchange.apply(x, self.shard, True) for x in (q, k, v)]  # [B, H / S, L, D]
        out = F.scaled_dot_product_attention(*whole, is_causal=self.causal, enable_gqa=gqa)
        return _Exchange.apply(out, self.shard, False)


def _segments_to_heads(x: Tensor, shard: SequenceShard) -> Tensor:
    """[B, H, l, D] -> [B, H / S, L, D]."""
    sent = x.unflatten(1, (shard.size, -1)).movedim(1, 0).contiguous()  # [S, B, H / S, l, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shard.require_group())
    return received.movedim(0, 2).flatten(2, 3)


def _heads_to_segments(x: Tensor, shard: SequenceShard) -> Tensor:
    """[B, H / S, L, D] -> [B, H, l, D]."""
    sent = x.unflatten(2, (shard.size, -1)).movedim(2, 0).contiguous()  # [S, B, H / S, l, D]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shard.require_group())
    return received.movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Exchange segments for heads, or back; the adjoint of either is the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard, to_heads: bool) -> Tensor:
        ctx.shard, ctx.to_heads = shard, to_heads
        return (_segments_to_heads if to_heads else _heads_to_segments)(x, shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_heads_to_segments if ctx.to_heads else _segments_to_heads)(grad, ctx.shard), None, None


ATTENTION: dict[str, Callable[[bool], nn.Module]] = {
    "ring": RingAttention,
    "ring-zigzag": RingZigzagAttention,
    "ulysses": UlyssesAttention,
}
