"""Activation checkpointing of a block by configuration: what is kept between forward and backward, and where."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from lightning_lss.attention.operator import ATTENTION

ActivationCheckpointing = Literal["none", "full", "selective", "offload"]

Block = Callable[[Tensor], Tensor]

# What attention becomes in torch, by device and kernel; outputs and log-sum-exps are what their backward needs.
_ATTENTION = {
    ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def run_block(block: Block, x: Tensor, how: ActivationCheckpointing, tiles: int = 1) -> Tensor:
    """``block(x)``, of which autograd keeps

    - ``none``: everything that it asks for;
    - ``full``: only ``x``; the block is computed again in the backward pass;
    - ``selective``: ``x`` and the result of attention with its log-sum-exp, so that all but the part that is quadratic
      in the sequence length is computed again (attention must be called as an operator, see
      :func:`~lightning_lss.attention.functional.lss_attention`);
    - ``offload``: ``x``, in (pinned) host memory.

    ``tiles`` are those of :func:`run_in_tiles` within the block.
    """
    if how == "none" or not torch.is_grad_enabled():
        return block(x)
    with _early_stop(tiles == 1):
        if how == "selective":
            return checkpoint(block, x, use_reentrant=False, context_fn=_keep_attention)
        if how == "offload":
            with save_on_cpu(pin_memory=x.is_cuda):
                return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False)


def _early_stop(wanted: bool) -> AbstractContextManager[Any]:
    """Whether computing again stops at the last tensor that is wanted, as it does by default.

    A block of tiles would stop within the last of them, before their results are put together. Under tensor parallelism
    these are of collectives that nobody would then wait for, and torch keeps such results for ever, with all that they
    were computed from. A tile by itself stops before its collective.
    """
    return nullcontext() if torch.compiler.is_compiling() else set_checkpoint_early_stop(wanted)


def run_in_tiles(function: Block, x: Tensor, tiles: int) -> Tensor:
    """``function(x)`` for [B, l, E], in ``tiles`` parts along the sequence; only ``x`` is kept.

    ``function`` must work token by token. What it holds between is never larger than a tile, since each is computed
    again by itself in the backward pass (TiledMLP of ALST, arXiv 2506.13996, section 3.2).
    """
    if tiles == 1:
        return function(x)
    parts = x.chunk(tiles, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([function(part) for part in parts], dim=1)
    with _early_stop(True):
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts], dim=1)


def _keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
