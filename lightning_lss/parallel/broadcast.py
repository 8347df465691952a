"""How a run starts and ends: modules get their segment, and all ranks the values of the first one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, segment_modules


def broadcast_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite the tensors with those of the first rank of ``group``, of the world by default, as DDP does when it starts;
    every rank of the group must call it."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def share_random_state(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give all ranks of ``group`` the states of its first rank's generators (Python, NumPy, torch, this CUDA
    device).

    What decides about a whole sample (DropPath, augmentation) then comes out equal on all ranks of a sequence group.
    """
    states = [_collect_rng_states(include_cuda=False)]
    dist.broadcast_object_list(states, group=group, group_src=0)
    _set_rng_states(states[0])
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        broadcast_from_first([state], group)
        torch.cuda.set_rng_state(state.cpu(), device)


def assign_segments(root: nn.Module, shard: SequenceShard, device: torch.device) -> None:
    """Hand this rank's shard to every module below ``root`` that takes one; every rank must call it.

    As DDP starts from rank 0's weights, a positional table starts from rank 0's rows, or from its seed while it has
    none.
    """
    modules = [module for module in segment_modules(root) if module.shard != shard]
    tables = [module for module in modules if isinstance(module, SegmentPositionalEmbedding)]
    tables = [table for table in tables if table.shard.size == 1]  # one of an earlier run has its rows already
    whole = [None if table.is_deferred else table.weight.detach() for table in tables]
    facts = [(table.seed, rows is not None) for table, rows in zip(tables, whole)]
    if facts:
        dist.broadcast_object_list(facts, group_src=0)
    for table, (seed, _) in zip(tables, facts):
        table.seed = seed
    for module in modules:
        module.set_shard(shard)
    for table, rows, (_, exists) in zip(tables, whole, facts):
        if exists:
            broadcast_rows(table, rows, device)
        elif rows is not None:
            table.reset_parameters()


def reset_segments(root: nn.Module) -> None:
    """Make attention plain again; a table keeps its shard, since it has only its own rows."""
    for module in segment_modules(root):
        if not module.segment_local:
            module.set_shard(WHOLE_SEQUENCE)


_ROWS_AT_A_TIME = 4096


def broadcast_rows(table: SegmentPositionalEmbedding, whole: Tensor | None, device: torch.device) -> None:
    """Give every rank of the world its rows of global rank 0's table ``whole`` [num_positions, dim], a few rows at a
    time."""
    for start in range(0, table.num_positions, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, table.num_positions - start)
        rows = torch.empty(count, table.dim, dtype=table.weight.dtype, device=device)
        if whole is not None and dist.get_rank() == 0:
            rows.copy_(whole[start : start + count])
        broadcast_from_first([rows])
        table.take_rows(start, rows)
