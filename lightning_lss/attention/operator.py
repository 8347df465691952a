"""Attention along a split sequence as one differentiable operation, for autograd and for the compiler.

Key/value heads are processed in head chunks. While one is computed, the next is gathered and the gradients of the last
are scattered. A rank holds its own tensors, two head chunks of K and V, and in backward two of their gradients. (Over
gloo it also holds the received addends of one; with ``communication_dtype`` also the copy of one that is sent.)

:class:`SplitAttention` is the operation for autograd. The registered operator ``torch.ops.lightning_lss.attention``
computes the same as one opaque node with a known shape: ``torch.compile(fullgraph=True)`` passes through it, and a
policy for selective activation checkpointing can name it.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from lightning_lss.sequence.collectives import Pending, resolve_group
from lightning_lss.sequence.segment import SequenceShard


class Attended(NamedTuple):
    """Results of the forward pass."""

    out: Tensor
    """[B, H, l, D], in memory [B, l, H, D], so that heads can be concatenated without a copy."""
    lse: Tensor
    """Log of the sum of the exponentials of each row's scores, [B, H, l]; float64 for float64 queries, else float32."""
    gathered: Tensor
    """K and V of the whole sequence, [2, B, G, L, D], with ``keep_gathered``; otherwise empty."""


def empty_attended(q: Tensor) -> Attended:
    """Allocate the output and log-sum-exp of queries [B, H, l, D]."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Attended(empty_rows(q), lse, q.new_empty(0))


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Attended:
    """Compute the rows of ``q`` [B, H, l, D] over the whole sequence's keys and values; ``k`` and ``v`` [B, G, l, D]
    are this rank's segment of them. Every rank of the sequence group must call it."""
    spec = spec.resolve(q, k)
    tiles, attended = spec.tiles(q.size(2)), empty_attended(q)
    rows = ForwardRows(q, attended.out, attended.lse)
    with no_autocast(q.device.type):
        for heads, keys_values in zip(spec.split_heads(q.size(1)), exchange.gathered_head_chunks(k, v, spec)):
            compute_tiles(cut_rows(rows, heads), keys_values, tiles, spec)
            if spec.keep_gathered:
                return attended._replace(gathered=keys_values)
    return attended


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``q`` [B, H, l, D], and of ``k`` and ``v`` as one tensor [2, B, G, l, D], from that of
    the output. Every rank of the sequence group must call it."""
    spec = spec.resolve(q, k)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    gathered = iter([attended.gathered]) if spec.keep_gathered else exchange.gathered_head_chunks(k, v, spec)
    rows = BackwardRows(grad, q, attended.out, attended.lse, empty_rows(q))
    with no_autocast(q.device.type):
        grads = list(_scattered_head_chunks(rows, gathered, k.size(1), spec))
    del gathered  # frees the buffers before the whole gradient is allocated
    whole = grads[0] if len(grads) == 1 else torch.cat(grads, 3)
    return rows.grad_q, exchange.heads_first(whole.to(q.dtype))


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


class SplitAttention(torch.autograd.Function):
    """:func:`attend` with its adjoint.

    ======== ===================================== =========================================================
    forward  q [B, H, l, D], k and v [B, G, l, D]  K, V <- all-gather(k, v) [B, G, L, D]; out [B, H, l, D]
    backward grad of out [B, H, l, D]              dq [B, H, l, D]; dk, dv <- reduce-scatter(dK, dV) [B, G, l, D]
    ======== ===================================== =========================================================
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See :func:`attend`."""
        attended = attend(q, k, v, spec)
        ctx.spec = spec
        ctx.save_for_backward(q, *attended, *(() if spec.keep_gathered else (k, v)))
        return attended.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """See :func:`attend_backward`."""
        grad_q, (grad_k, grad_v) = attend_backward(grad, *_saved(ctx.saved_tensors), ctx.spec)
        return grad_q, grad_k, grad_v, None


def _saved(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Attended]:
    """Queries, this rank's keys and values, and the results of the forward pass."""
    # with keep_gathered K and V of the whole sequence stand for this rank's: backward reads only their number of heads
    q, out, lse, gathered, *own = tensors
    k, v = own or gathered.unbind()
    return q, k, v, Attended(out, lse, gathered)


# -- the registered operator -------------------------------------------------------------------------------------------

_SPEC = (
    "SymInt rank, SymInt size, str layout, str group, ScalarType? communication_dtype, bool causal, float scale,"
    " str kernel_name, SymInt? head_chunks, bool keep_gathered"
)
"""The keyword arguments of the operators. (Inductor calls a parameter of its own ``kernel``.)"""


_SHARD_FIELDS = tuple(field.name for field in fields(SequenceShard) if field.name != "group")
_SPEC_FIELDS = tuple(field.name for field in fields(AttentionSpec) if field.name not in ("shard", "kernel"))


def spec_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Return the fields of ``spec`` and of its shard as in ``_SPEC``; a process group goes by its name in torch."""
    shard = spec.shard
    place = {name: getattr(shard, name) for name in _SHARD_FIELDS}
    options = {name: getattr(spec, name) for name in _SPEC_FIELDS}  # one that the schema lacks is refused by torch
    group = shard.require_group().group_name if shard.size > 1 else ""
    return {**place, **options, "group": group, "kernel_name": spec.kernel}


def _spec_of(
    rank: int, size: int, layout: str, group: str, communication_dtype: Any, kernel_name: str, **options: Any
) -> AttentionSpec:
    shard = SequenceShard(rank, size, layout, resolve_group(group) if size > 1 else None, communication_dtype)
    return AttentionSpec(shard, kernel=kernel_name, **options)


@torch.library.custom_op(
    "lightning_lss::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, *, {_SPEC}) -> (Tensor, Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q, k, v, _spec_of(**fields))


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *, size: int, keep_gathered: bool, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, gathered = empty_attended(q)
    return out, lse, exchange.heads_first(exchange.empty_head_chunk(k, size)) if keep_gathered else gathered


@torch.library.custom_op(
    "lightning_lss::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gathered, *, {_SPEC}) -> (Tensor, Tensor)",
)
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, **fields: Any
) -> tuple[Tensor, Tensor]:
    return attend_backward(grad, q, k, v, Attended(out, lse, gathered), _spec_of(**fields))


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *rest: Any, **fields: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(q), exchange.heads_first(exchange.empty_head_chunk(q[:, : k.size(1)], 1))


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    q, k, v = inputs
    ctx.fields = keyword_only_inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward receives zeros as large as the gathered keys and values
    ctx.save_for_backward(q, *output, *(() if ctx.fields["keep_gathered"] else (k, v)))


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, attended = _saved(ctx.saved_tensors)
    grad_q, grad_keys_values = _attention_backward(grad, q, k, v, *attended, **ctx.fields)
    return grad_q, grad_keys_values[0], grad_keys_values[1]


_attention.register_autograd(_backward, setup_context=_setup_context)

ATTENTION = torch.ops.lightning_lss.attention.default
"""The overload that dispatch modes and checkpointing policies see."""


def attention_operator(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """Call :func:`attend` as ``torch.ops.lightning_lss.attention`` and return its output [B, H, l, D]."""
    return _attention(q, k, v, **spec_fields(spec))[0]
