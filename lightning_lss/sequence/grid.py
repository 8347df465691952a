"""The world as a grid of data x sequence: its sizes, its ranks, its process groups.

Global rank ``g`` of a world ``W = D * S`` has data rank ``g // S`` and segment ``g % S``. Neighbouring ranks form one
sequence group, since they share the fastest links.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def rank_grid(world_size: int, size: int) -> Tensor:
    """Global ranks, int64 [D, S]: rows are sequence groups in segment order, columns are data groups."""
    return torch.arange(world_size, device="cpu").view(-1, size)


@dataclass(frozen=True)
class SequenceGrid:
    """This process's groups in the grid; a group of one rank is ``None``."""

    world_size: int
    size: int
    global_rank: int
    sequence_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None

    @property
    def data_size(self) -> int:
        """Number of batches in flight, D = W / S."""
        return self.world_size // self.size

    @property
    def data_rank(self) -> int:
        """Which of the D batches this process works on."""
        return self.global_rank // self.size

    @property
    def sequence_rank(self) -> int:
        """Which of the S segments this process holds."""
        return self.global_rank % self.size

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The grid as torch's DeviceMesh; its dimensions are ``data`` and ``sequence`` where larger than 1."""
        grid = rank_grid(self.world_size, self.size)
        dims = {name: x for name, x in (("data", self.data_group), ("sequence", self.sequence_group)) if x is not None}
        if not dims:
            raise ValueError("A world of one process has no device mesh.")
        return DeviceMesh.from_group(list(dims.values()), device_type, mesh=grid.squeeze(), mesh_dim_names=tuple(dims))

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGrid":
        return self  # process groups belong to the process: copies of a strategy share them


def build_grid(world_size: int, global_rank: int, size: int, timeout: timedelta | None = None) -> SequenceGrid:
    """Create the process groups of the grid; every rank of the world must call it.

    ``init_device_mesh`` gives its subgroups the default timeout, not that of the world. So the groups are created here
    with ``timeout``, and :meth:`SequenceGrid.device_mesh` only wraps them.
    """

    def subgroup(ranks: list[list[int]]) -> dist.ProcessGroup | None:
        if len(ranks[0]) == 1:
            return None
        if len(ranks) == 1 and size == 1:
            return dist.group.WORLD  # plain data parallelism needs no second group
        return dist.new_subgroups_by_enumeration(ranks, timeout=timeout)[0]

    ranks = rank_grid(world_size, size)
    return SequenceGrid(world_size, size, global_rank, subgroup(ranks.tolist()), subgroup(ranks.T.tolist()))
