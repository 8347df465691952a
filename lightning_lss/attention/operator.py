"""Attention along a split sequence as a registered operator, ``torch.ops.lightning_lss.attention``.

The compiler and selective activation checkpointing see one operator with a known shape, instead of collectives and
their handles: ``torch.compile(fullgraph=True)`` passes through, and a checkpointing policy can name it as something to
keep. It computes what :class:`~lightning_lss.attention.compute.SplitAttention` does. A process group enters by the name
under which torch has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from lightning_lss.attention.compute import (
    Attended,
    Plan,
    attend,
    attend_backward,
    empty_attended,
    empty_gathered,
    make_plan,
)
from lightning_lss.sequence.segment import SequenceShard


def _plan(  # the operators' options, see _OPTIONS
    q: Tensor,
    k: Tensor,
    rank: int,
    size: int,
    layout: str,
    group: str,
    communication_dtype: torch.dtype | None,
    causal: bool,
    scale: float,
    kernel: str,
    head_chunks: int | None,
    keep_gathered: bool,
) -> Plan:
    process_group = _resolve_process_group(group) if size > 1 else None  # type: ignore[arg-type]
    shard = SequenceShard(rank, size, layout, process_group, communication_dtype)
    return make_plan(q, k, shard, causal, scale, kernel, head_chunks, keep_gathered)


_OPTIONS = (
    "SymInt rank, SymInt size, str layout, str group, ScalarType? communication_dtype, bool causal, float scale,"
    " str kernel, SymInt? head_chunks, bool keep_gathered"
)


@torch.library.custom_op(
    "lightning_lss::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q, k, v, _plan(q, k, *options))


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, gathered = empty_attended(q)
    if options[-1]:  # keep_gathered
        gathered = empty_gathered(k, size)
    return out, lse, gathered


@torch.library.custom_op(
    "lightning_lss::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor gathered,"
        f" {_OPTIONS}) -> (Tensor, Tensor)"
    ),
)
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    return attend_backward(grad, q, k, v, Attended(out, lse, gathered), _plan(q, k, *options))


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_attended(q).out, empty_gathered(q[:, : k.size(1)], 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *options = inputs
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward is handed zeros as large as the gathered keys and values
    keeps_gathered = options[-1]
    own = () if keeps_gathered else (k, v)
    ctx.save_for_backward(q, *output, *own)


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    q, out, lse, gathered, *own = ctx.saved_tensors
    k, v = own or gathered.unbind()
    grad_q, grad_keys_values = _attention_backward(grad, q, k, v, out, lse, gathered, *ctx.options)
    return grad_q, grad_keys_values[0], grad_keys_values[1], *(None for _ in ctx.options)


_attention.register_autograd(_backward, setup_context=_setup_context)

ATTENTION = torch.ops.lightning_lss.attention.default
"""The operator as dispatch modes and checkpointing policies see it."""


def attention_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    causal: bool,
    scale: float,
    kernel: str,
    head_chunks: int | None,
    keep_gathered: bool,
) -> Tensor:
    """Attention as ``torch.ops.lightning_lss.attention``; for arguments see
    :func:`~lightning_lss.attention.compute.make_plan`."""
    group = shard.require_group().group_name if shard.size > 1 else ""
    place = (shard.rank, shard.size, shard.layout, group, shard.communication_dtype)
    return _attention(q, k, v, *place, causal, scale, kernel, head_chunks, keep_gathered)[0]
