"""Attention along a split sequence as one operator, ``torch.ops.lightning_lss.attention``, with its adjoint.

======== ===================================== =========================================================
forward  q [B, H, l, D], k and v [B, G, l, D]  K, V <- all-gather(k, v) [B, G, L, D]; out [B, H, l, D]
backward grad of out [B, H, l, D]              dq [B, H, l, D]; dk, dv <- reduce-scatter(dK, dV) [B, G, l, D]
======== ===================================== =========================================================

Key/value heads are processed in head chunks. While one is computed, the next is gathered and the gradients of the last
are scattered. A rank holds its own tensors, two head chunks of K and V, and in backward two of their gradients. (Over
gloo it also holds the received addends of one; with ``communication_dtype`` also the copy of one that is sent.)

The operator is one opaque node with known shapes: ``torch.compile(fullgraph=True)`` passes through it, and a policy for
selective activation checkpointing can name it.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_lss.attention import exchange
from lightning_lss.attention.compute import (
    BackwardRows,
    ForwardRows,
    compute_tiles,
    compute_tiles_backward,
    cut_rows,
    empty_rows,
    no_autocast,
)
from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.attention.tiles import pairs_of_rank
from lightning_lss.sequence.collectives import Pending, resolve_group
from lightning_lss.sequence.segment import SequenceShard

_SPEC = (
    "SymInt rank, SymInt size, str layout, str group, ScalarType? communication_dtype, bool causal, float scale,"
    " str kernel_name, SymInt? head_chunks, bool keep_gathered"
)
"""The keyword arguments of the operators: the fields of a spec and of its shard."""


_SHARD_FIELDS = tuple(field.name for field in fields(SequenceShard) if field.name != "group")
_SPEC_FIELDS = tuple(field.name for field in fields(AttentionSpec) if field.name != "shard")


def spec_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Return ``spec`` as keyword arguments of the operators; a process group goes by its name in torch."""
    shard = spec.shard
    place = {name: getattr(shard, name) for name in _SHARD_FIELDS}  # torch 2.11 cannot compile vars(...)
    options = {name: getattr(spec, name) for name in _SPEC_FIELDS}
    return {**place, **options, "group": shard.require_group().group_name if shard.size > 1 else ""}


def _spec_of(
    rank: int, size: int, layout: str, group: str, communication_dtype: torch.dtype | None, **options: Any
) -> AttentionSpec:
    shard = SequenceShard(rank, size, layout, resolve_group(group) if size > 1 else None, communication_dtype)
    return AttentionSpec(shard, **options)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what :func:`attend` returns for queries [B, H, l, D] without ``keep_gathered``."""
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_rows(q), lse, q.new_empty(0)


@torch.library.custom_op(
    "lightning_lss::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, *, {_SPEC}) -> (Tensor, Tensor, Tensor)",
)
def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the rows of ``q`` [B, H, l, D] over the whole sequence's keys and values; ``k`` and ``v`` [B, G, l, D]
    are this rank's segment of them. Every rank of the sequence group must call it.

    Returns:
        the output [B, H, l, D], in memory [B, l, H, D], so that heads can be concatenated without a copy; the log of
        the sum of the exponentials of each row's scores [B, H, l], float64 for float64 queries, else float32; K and V
        of the whole sequence [2, B, G, L, D] with ``keep_gathered``, otherwise an empty tensor.
    """
    spec = _spec_of(**options).resolve(q, k)
    out, lse, gathered = _empty_results(q)
    rows, tiles = ForwardRows(q, out, lse), spec.tiles(q.size(2))
    with no_autocast(q.device.type):
        for heads, keys_values in zip(spec.split_heads(q.size(1)), exchange.gathered_head_chunks(k, v, spec)):
            compute_tiles(cut_rows(rows, heads), keys_values, tiles, spec)
            if spec.keep_gathered:
                gathered = keys_values
    return out, lse, gathered


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *, size: int, keep_gathered: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, gathered = _empty_results(q)
    return out, lse, exchange.heads_first(exchange.empty_head_chunk(k, size)) if keep_gathered else gathered


@torch.library.custom_op(
    "lightning_lss::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gathered,"
    f" *, {_SPEC}) -> (Tensor, Tensor)",
)
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``q`` [B, H, l, D], and of ``k`` and ``v`` as one tensor [2, B, G, l, D], from that of
    the output and the results of :func:`attend`. Every rank of the sequence group must call it."""
    spec = _spec_of(**options).resolve(q, k)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    head_chunks = iter([gathered]) if spec.keep_gathered else exchange.gathered_head_chunks(k, v, spec)
    rows = BackwardRows(grad, q, out, lse, empty_rows(q))
    with no_autocast(q.device.type):
        grads = list(_scattered_head_chunks(rows, head_chunks, k.size(1), spec))
    del head_chunks  # frees the buffers before the whole gradient is allocated
    whole = grads[0] if len(grads) == 1 else torch.cat(grads, 3)
    return rows.grad_q, exchange.heads_first(whole.to(q.dtype))


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(q), exchange.heads_first(exchange.empty_head_chunk(q[:, : k.size(1)], 1))


def _scattered_head_chunks(
    rows: BackwardRows, gathered: Iterator[Tensor], kv_heads: int, spec: AttentionSpec
) -> Iterator[Tensor]:
    """Compute the gradients of this rank's K and V by head chunk, [l, 2, B, g, D], and fill in ``rows.grad_q``."""
    tiles, size = spec.tiles(rows.q.size(2)), spec.shard.size
    like_keys = rows.q[:, spec.split_heads(kv_heads)[0]]
    buffers = exchange.Buffers(2, lambda: exchange.empty_head_chunk(like_keys, size).unflatten(0, (size, -1)))
    in_flight: Pending | None = None
    for heads in spec.split_heads(rows.q.size(1)):
        keys_values, by_rank = next(gathered), buffers.next()
        compute_tiles_backward(cut_rows(rows, heads), keys_values, by_rank, tiles, spec)
        if in_flight is not None:
            yield in_flight.wait()
            in_flight = None  # frees the received addends before those of the next are allocated
        in_flight = exchange.scatter_gradients(by_rank, spec)
    assert in_flight is not None
    yield in_flight.wait()


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    q, k, v = inputs
    ctx.fields = keyword_only_inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward receives zeros as large as the gathered keys and values
    ctx.save_for_backward(q, *output, *(() if ctx.fields["keep_gathered"] else (k, v)))


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor, Tensor, Tensor]:
    # with keep_gathered K and V of the whole sequence stand for this rank's: backward reads only their number of heads
    q, out, lse, gathered, *own = ctx.saved_tensors
    k, v = own or gathered.unbind()
    grad = torch.zeros_like(out) if grad is None else grad  # other ranks wait for this one
    grad_q, grad_keys_values = attend_backward(grad, q, k, v, out, lse, gathered, **ctx.fields)
    return grad_q, grad_keys_values[0], grad_keys_values[1]


attend.register_autograd(_backward, setup_context=_setup_context)

ATTENTION = torch.ops.lightning_lss.attention.default
"""The overload that dispatch modes and checkpointing policies see."""


@register_flop_formula([torch.ops.lightning_lss.attention, torch.ops.lightning_lss.attention_backward])
def _flops(q: tuple[int, ...], *others: Any, rank: int, size: int, layout: str, causal: bool, **_: Any) -> int:
    """Count the operations of the visible pairs for torch's ``FlopCounterMode``: 2 matrix multiplications, 5 backward."""
    batch, heads, length, width = q  # backward: those of the gradient
    pairs = pairs_of_rank(length * size, rank, size, layout, causal)
    return 2 * (2 if len(others) == 2 else 5) * batch * heads * width * pairs
