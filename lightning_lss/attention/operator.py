"""Attention along a split sequence as one operator, ``torch.ops.lightning_lss.attention``, with its adjoint.

======== ============================================== =======================================================
forward  q [B, H, l, D], k [B, G, l, D], v [B, G, l, Dv]  K, V <- gather(k, v) [B, G, L, .]; out [B, H, l, Dv]
backward grad of out [B, H, l, Dv]                        dq [B, H, l, D]; dk, dv <- scatter(dK, dV) [B, G, l, .]
======== ============================================== =======================================================

Key/value heads are processed in head chunks. While one is computed, the next is fetched and the gradients of the last
are returned. A rank holds its own tensors, two head chunks of K and V, and in backward two of their gradients. (Over
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
    KeySums,
    compute_rows,
    compute_rows_backward,
    no_autocast,
    rows_of_heads,
)
from lightning_lss.attention.packing import kept_functions
from lightning_lss.attention.plan import Plan
from lightning_lss.attention.scores import ScoreMaker
from lightning_lss.attention.spec import AttentionSpec, Modifiers
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.collectives import Pending, resolve_group
from lightning_lss.sequence.segment import SequenceShard

_MODIFIERS = ", ".join(f"Tensor? {name}=None" for name in Modifiers._fields)
_SPEC = (
    "SymInt rank, SymInt size, str layout, str group, ScalarType? communication_dtype, SymInt padding, bool causal,"
    " float scale, str kernel_name, str masked_kernel_name, SymInt? head_chunks, bool keep_gathered, float? softcap,"
    " float dropout, bool whole_memory"
)
"""The keyword arguments of the operators: the fields of a spec and of its shard."""

_SHARD_FIELDS = tuple(
    field.name for field in fields(SequenceShard) if field.name not in ("group", "assignment", "is_current")
)
_SPEC_FIELDS = tuple(field.name for field in fields(AttentionSpec) if field.name != "shard")


def spec_fields(spec: AttentionSpec) -> dict[str, Any]:
    """Return ``spec`` as keyword arguments of the operators; a process group goes by its name in torch."""
    shard = spec.shard
    place = {name: getattr(shard, name) for name in _SHARD_FIELDS}  # torch 2.11 cannot compile vars(...)
    options = {name: getattr(spec, name) for name in _SPEC_FIELDS}
    return {**place, **options, "group": shard.require_group().group_name if shard.size > 1 else ""}


def _spec_of(
    modifiers: Modifiers,
    rank: int,
    size: int,
    layout: str,
    group: str,
    communication_dtype: torch.dtype | None,
    padding: int,
    **options: Any,
) -> AttentionSpec:
    of_group = resolve_group(group) if size > 1 else None
    assignment = None if modifiers.assignment is None else ChunkAssignment.from_tensor(modifiers.assignment)
    shard = SequenceShard(rank, size, layout, of_group, communication_dtype, assignment, padding)
    return AttentionSpec(shard, **options)


def _empty_rows(q: Tensor, width: int) -> Tensor:
    """Allocate rows [B, H, l, width] for ``q`` [B, H, l, D], in memory [B, l, H, width], so that the heads of a token are
    adjacent."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what :func:`attend` returns without ``keep_gathered``."""
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return _empty_rows(q, v.size(-1)), lse, q.new_empty(0)


@torch.library.custom_op(
    "lightning_lss::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_MODIFIERS}, *, {_SPEC}) -> (Tensor, Tensor, Tensor)",
)
def attend(q: Tensor, k: Tensor, v: Tensor, *modifiers: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the rows of ``q`` [B, H, l, D] over the keys and values that they see of the whole sequence; ``k`` [B, G,
    l, D] and ``v`` [B, G, l, Dv] are this rank's segment of them. Every rank of the sequence group must call it.

    Returns:
        the output [B, H, l, Dv], in memory [B, l, H, Dv], so that heads can be concatenated without a copy; the log of
        the sum of the exponentials of each row's scores [B, H, l], float64 for float64 queries, else float32, and 0 for a
        row that sees nothing; K and V of the whole sequence [B, G, L, D + Dv] with ``keep_gathered``, otherwise an empty
        tensor.
    """
    changed = Modifiers(*modifiers)
    spec, plan = _spec_of(changed, **options).plan(q, k, v, changed)
    out, lse, gathered = _empty_results(q, v)
    rows, width = ForwardRows(q, out, lse), q.size(-1)
    with no_autocast(q.device.type):
        fetched = exchange.fetched_head_chunks(k, v, spec, plan.needs)
        for heads, keys_values in zip(spec.split_heads(q.size(1)), fetched):
            maker = ScoreMaker(spec, plan, changed, heads, lse)
            sinks = None if changed.sinks is None else changed.sinks[heads]
            own = keys_values[..., :width], keys_values[..., width:]
            compute_rows(rows_of_heads(rows, heads), *own, plan, maker, sinks)
            if spec.keep_gathered:
                gathered = keys_values
    return out, lse, gathered


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None, size: int, keep_gathered: bool, whole_memory: bool, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, gathered = _empty_results(q, v)
    length = k.size(2) * (1 if whole_memory else size)
    return out, lse, exchange.heads_first(exchange.empty_head_chunk(k, v, length)) if keep_gathered else gathered


@torch.library.custom_op(
    "lightning_lss::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gathered,"
    f" {_MODIFIERS}, *, {_SPEC}) -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gathered: Tensor,
    *modifiers: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``q`` [B, H, l, D], of ``k`` and ``v`` as one tensor [B, G, l, D + Dv], and of the sinks
    [H] (empty without them), from that of the output and the results of :func:`attend`. Every rank of the sequence
    group must call it."""
    changed = Modifiers(*modifiers)
    spec, plan = _spec_of(changed, **options).plan(q, k, v, changed)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    head_chunks = iter([gathered]) if spec.keep_gathered else exchange.fetched_head_chunks(k, v, spec, plan.needs)
    rows = BackwardRows(grad, q, out, lse, _empty_rows(q, q.size(-1)))
    with no_autocast(q.device.type):
        grads = list(_returned_head_chunks(rows, head_chunks, k, v, spec, plan, changed))
    del head_chunks  # frees the buffers before the whole gradient is allocated
    whole = grads[0] if len(grads) == 1 else torch.cat(grads, 2)
    return rows.grad_q, exchange.heads_first(whole.to(q.dtype)), _grad_sinks(grad, out, lse, changed.sinks)


_RESULTS = 3  # out, lse and gathered, which backward takes between the values and the modifiers


@attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    whole = exchange.heads_first(exchange.empty_head_chunk(k, v, k.size(2)))
    sinks = Modifiers(*rest[_RESULTS:]).sinks
    return _empty_rows(q, q.size(-1)), whole, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _returned_head_chunks(
    rows: BackwardRows,
    fetched: Iterator[Tensor],
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    plan: Plan,
    modifiers: Modifiers,
) -> Iterator[Tensor]:
    """Compute the gradients of this rank's K and V by head chunk, [l, B, g, D + Dv], and fill in ``rows.grad_q``."""
    first, width = spec.split_heads(k.size(1))[0], k.size(-1)
    # each addition to a sum in half precision rounds it
    dtype = rows.lse.dtype if plan.sums > 2 else k.dtype
    buffers = exchange.Buffers(2, lambda: exchange.empty_gradients(k[:, first], v[:, first], spec, plan.needs, dtype))
    in_flight: Pending | None = None
    for heads in spec.split_heads(rows.q.size(1)):
        keys_values, grads = next(fetched), buffers.next()
        maker = ScoreMaker(spec, plan, modifiers, heads, rows.lse)
        sums = KeySums(exchange.gradients_in_order(grads, spec, plan.needs), width)
        own = keys_values[..., :width], keys_values[..., width:]
        compute_rows_backward(rows_of_heads(rows, heads), *own, sums, plan, maker)
        if in_flight is not None:
            yield in_flight.wait()
            in_flight = None  # frees the received addends before those of the next are allocated
        in_flight = exchange.return_gradients(grads.to(k.dtype), k.size(2), spec, plan.needs)
    assert in_flight is not None
    yield in_flight.wait()


def _grad_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """The gradient of the sinks [H]: a sink takes its share of each row for a value that is zero."""
    if sinks is None:
        return lse.new_empty(0, dtype=out.dtype)
    shares = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(shares * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    q, k, v, *modifiers = inputs
    ctx.fields = keyword_only_inputs
    ctx.functions = kept_functions(
        Modifiers(*modifiers).mask
    )  # saved tensors may come back as copies, which keep nothing
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward receives zeros as large as the gathered keys and values
    kept = ctx.fields["keep_gathered"]
    ctx.save_for_backward(q, *output, *modifiers, *(() if kept else (k, v)))


def _backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    q, out, lse, gathered, *rest = ctx.saved_tensors
    modifiers, own = rest[: len(Modifiers._fields)], rest[len(Modifiers._fields) :]
    width = q.size(-1)
    if not own:
        # with keep_gathered the first positions of K and V stand for this rank's: backward reads their shapes
        length = gathered.size(2) // (1 if ctx.fields["whole_memory"] else ctx.fields["size"])
        own = gathered[:, :, :length].split((width, gathered.size(-1) - width), -1)
    grad = torch.zeros_like(out) if grad is None else grad  # other ranks wait for this one
    grad_q, grad_keys_values, grad_sinks = attend_backward(grad, q, *own, out, lse, gathered, *modifiers, **ctx.fields)
    others = [None] * (len(modifiers) - 1)
    return (
        grad_q,
        grad_keys_values[..., :width],
        grad_keys_values[..., width:],
        None if modifiers[0] is None else grad_sinks,
        *others,
    )


attend.register_autograd(_backward, setup_context=_setup_context)

ATTENTION = torch.ops.lightning_lss.attention.default
"""The overload that dispatch modes and checkpointing policies see."""


@register_flop_formula([torch.ops.lightning_lss.attention], get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, *modifiers: Tensor | None, out_val: Any = None, **options: Any) -> int:
    """Count the operations of the computed pairs for torch's ``FlopCounterMode``: 2 matrix multiplications."""
    return 2 * (q.size(-1) + v.size(-1)) * _pairs(q, k, v, modifiers, options)


@register_flop_formula([torch.ops.lightning_lss.attention_backward], get_raw=True)
def _flops_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, out_val: Any = None, **options: Any
) -> int:
    """The same for 5: scores, and the gradients of queries and keys, of probabilities and values."""
    return 2 * (3 * q.size(-1) + 2 * v.size(-1)) * _pairs(q, k, v, rest[_RESULTS:], options)


def _pairs(q: Tensor, k: Tensor, v: Tensor, modifiers: tuple[Tensor | None, ...], options: dict[str, Any]) -> int:
    changed = Modifiers(*modifiers)
    _, plan = _spec_of(changed, **options).plan(q, k, v, changed)
    return q.size(1) * plan.pairs
