"""How a run starts and ends: modules get their place in the sequence group, and all ranks the same weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.sequence.grid import SequenceMesh
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, sharded_modules


def give_shards(root: nn.Module, shard: SequenceShard, device: torch.device) -> None:
    """Hand this rank's shard to every module below ``root`` that takes one; every rank must call it.

    As DDP starts from rank 0's weights, a positional table starts from rank 0's rows, or from its seed while it has
    none.
    """
    modules = [module for module in sharded_modules(root) if module.shard != shard]
    tables = [module for module in modules if isinstance(module, SegmentPositionalEmbedding)]
    tables = [table for table in tables if table.shard.size == 1]  # one of an earlier run has its rows already
    whole = [None if table.is_deferred else table.weight.detach() for table in tables]
    facts = [(table.seed, rows is not None) for table, rows in zip(tables, whole)]
    if facts:
        dist.broadcast_object_list(facts, src=0)
    for table, (seed, _) in zip(tables, facts):
        table.seed = seed
    for module in modules:
        module.set_shard(shard)
    for table, rows, (_, exists) in zip(tables, whole, facts):
        if exists:
            broadcast_rows(table, rows, device)
        elif rows is not None:
            table.reset_parameters()


def take_shards(root: nn.Module) -> None:
    """Attention is plain again; a table keeps its place, since it has only its own rows."""
    for module in sharded_modules(root):
        if not module.segment_local:
            module.set_shard(WHOLE_SEQUENCE)


def broadcast_over_data_group(module: nn.Module, names: Iterable[str], mesh: SequenceMesh) -> None:
    """Start the named segment-local parameters and buffers from those of the first rank that holds the segment, as DDP
    does."""
    if mesh.data_group is None:
        return
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    for name in names:
        dist.broadcast(tensors[name].detach(), group=mesh.data_group, group_src=0)


_ROWS_AT_A_TIME = 4096


def broadcast_rows(table: SegmentPositionalEmbedding, whole: Tensor | None, device: torch.device) -> None:
    """Give every rank of the world its rows of global rank 0's table ``whole`` [num_positions, dim], a few rows at a
    time."""
    for start in range(0, table.num_positions, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, table.num_positions - start)
        rows = torch.empty(count, table.dim, dtype=table.weight.dtype, device=device)
        if whole is not None and dist.get_rank() == 0:
            rows.copy_(whole[start : start + count])
        dist.broadcast(rows, src=0)
        table.take_rows(start, rows)


def share_random_state(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give all ranks of ``group`` the states of its first rank's generators (Python, NumPy, torch, this CUDA
    device)."""
    states = [_collect_rng_states(include_cuda=False)]
    dist.broadcast_object_list(states, group=group, group_src=0)
    _set_rng_states(states[0])
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, group=group, group_src=0)
        torch.cuda.set_rng_state(state.cpu(), device)
