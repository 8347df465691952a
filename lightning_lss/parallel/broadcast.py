"""Start a run from the values of the first rank, and assign segments to modules."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from lightning_lss.nn.positions import SegmentPositionalEmbedding
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard, ShardedModule, segment_modules


def broadcast_from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite the tensors with those of the first rank of ``group``, by default of the world, as DDP does at its
    start.

    Every rank of the group must call it.
    """
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=0)


def share_random_state(group: dist.ProcessGroup, device: torch.device) -> None:
    """Set the generators of all ranks of ``group`` (Python, NumPy, torch, this CUDA device) to the states of its first
    rank; every rank of the group must call it.

    Random decisions about a whole sample (DropPath, augmentation) are then equal on all ranks of a sequence group.
    """
    states = [_collect_rng_states(include_cuda=False)]
    dist.broadcast_object_list(states, group=group, group_src=0)
    _set_rng_states(states[0])
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        broadcast_from_first([state], group)
        torch.cuda.set_rng_state(state.cpu(), device)


def assign_segments(modules: Iterable[ShardedModule], shard: SequenceShard, device: torch.device) -> None:
    """Set the shard of every module among ``modules``; every rank must call it with the same ones.

    A positional table starts from rank 0's rows, as DDP starts from rank 0's weights; a table without rows yet starts
    from rank 0's seed.
    """
    modules = [module for module in modules if module.shard != shard]
    tables = [module for module in modules if isinstance(module, SegmentPositionalEmbedding)]
    tables = [table for table in tables if table.shard.size == 1]  # tables of an earlier run have their rows already
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
    """Set modules below ``root`` back to whole sequences, except positional tables: these have only their own rows."""
    for module in segment_modules(root):
        if not module.segment_local:
            module.set_shard(WHOLE_SEQUENCE)


_ROWS_AT_A_TIME = 4096


def broadcast_rows(table: SegmentPositionalEmbedding, whole: Tensor | None, device: torch.device) -> None:
    """Send every rank of the world its rows of the table ``whole`` [num_positions, dim] of global rank 0, a few rows at
    a time; other ranks may pass None."""
    for start in range(0, table.num_positions, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, table.num_positions - start)
        rows = torch.empty(count, table.dim, dtype=table.weight.dtype, device=device)
        if whole is not None and dist.get_rank() == 0:
            rows.copy_(whole[start : start + count])
        broadcast_from_first([rows])
        table.take_rows(start, rows)
