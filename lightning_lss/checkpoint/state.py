"""Whose the tensors of a checkpoint are, and how they are gathered from all ranks or cut to one rank's part.

A file is Lightning's own, so it opens without this package. (torch's ``get_optimizer_state_dict`` has names where these
files have indices, and refuses gradients before the first step.)
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_lss.nn.positions import SegmentPositionalEmbedding

KeyPath = tuple[Any, ...]
"""Keys and indices that lead through a nested checkpoint to a tensor."""

Owner = SegmentPositionalEmbedding | Tensor | None
"""What decides how a tensor is spread over ranks: the positional table or the parameter that it belongs to, or nothing."""


class Owners:
    """The owners of a checkpoint's tensors, by their paths.

    Tensors of the model are found by the parameter's name at any depth, so copies of the model that callbacks store
    beside it (weight averaging) have owners too. An optimizer's state is found by the parameter's index; ``optimizers``
    are those of ``checkpoint["optimizer_states"]``.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        tables = [x for x in module.modules() if isinstance(x, SegmentPositionalEmbedding) and x.shard.size > 1]
        self.tables = {table.weight: table for table in tables}
        """The positional tables that are spread over ranks, by their weights."""
        named = module.named_parameters(remove_duplicate=False)
        self._by_name: dict[Any, Owner] = {name: self.tables.get(x, x) for name, x in named}
        self._by_index: dict[KeyPath, Owner] = {}
        for number, optimizer in enumerate(optimizers):
            parameters = [x for group in optimizer.param_groups for x in group["params"]]
            self._by_index |= {(number, "state", index): self.tables.get(x, x) for index, x in enumerate(parameters)}

    def __call__(self, path: KeyPath) -> Owner:
        """Return the owner of the tensor at ``path``."""
        return self._by_index.get(path[1:4]) if path[0] == "optimizer_states" else self._by_name.get(path[-1])

    @property
    def are_spread(self) -> bool:
        """Whether a rank holds only parts of some tensors."""
        return bool(self.tables) or any(isinstance(owner, DTensor) for owner in self._by_name.values())


def map_tensors(state: Any, convert: Callable[[KeyPath, Tensor], Any], path: KeyPath = ()) -> Any:
    """Copy a nested state with ``convert(path, tensor)`` in place of each tensor; containers keep their types.

    The order depends on the keys alone, so ``convert`` may communicate. ``path`` is that of ``state`` in the checkpoint.
    """
    if isinstance(state, Tensor):
        return convert(path, state)
    if type(state) is list:
        return [map_tensors(value, convert, (*path, index)) for index, value in enumerate(state)]
    if not isinstance(state, dict):
        return state
    mapped = copy.copy(state)  # a Counter stays one, and a module's state keeps its versions
    for key in sorted(state, key=str):
        mapped[key] = map_tensors(state[key], convert, (*path, key))
    return mapped


def gather(tensor: Tensor, owner: Owner) -> Tensor:
    """Gather a tensor that is spread over ranks, rows in position order; return any other as it is.

    Every rank must call it.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if isinstance(owner, SegmentPositionalEmbedding) and tensor.shape == owner.weight.shape:
        rows = tensor.detach().to(owner.weight.device)  # weight averaging may keep its copy elsewhere
        return owner.shard.gather(rows, dim=0).to(tensor.device)
    return tensor


def own_part(tensor: Tensor, owner: Owner) -> Tensor:
    """Invert :func:`gather` without communication: cut a whole tensor to this rank's part."""
    if isinstance(owner, SegmentPositionalEmbedding) and tensor.shape == (owner.num_positions, owner.dim):
        return owner.own_rows(tensor)
    if isinstance(owner, DTensor) and tensor.shape == owner.shape:
        return distribute_tensor(tensor.detach(), owner.device_mesh, owner.placements, src_data_rank=None)
    return tensor


def own_parts(state: Any, owners: Owners, path: KeyPath = ()) -> Any:
    """Cut the tensors of a state, which lies at ``path`` in a checkpoint, to this rank's parts."""
    return map_tensors(state, lambda path, tensor: own_part(tensor, owners(path)), path)
