"""Showing a module the whole of a batch of which each rank holds its part."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_lss.nn.recompute import repeated_blocks
from lightning_lss.sequence.batch import Path, SequenceDims, map_tensors, sequence_dim, tensors_by_path
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.split_tensor import SplitTensor, split, whole

MOST_DIMS = 3
"""Of entries that are split unless they are named: dimension 1 of [B, C, H, W] is that of channels."""


def show_whole(batch: Any, shard: SequenceShard, sequence_dims: SequenceDims | None = None) -> Any:
    """Replace tensors of a batch by :class:`SplitTensor`; each shows itself as whole.

    Dimension 1 of tensors with two or three dimensions is split where it is as long as most tensors', in any nesting of
    containers. What is computed does not depend on what is split, and sequences of any length are.

    Args:
        batch: with whole sequences, the same on all ranks of the sequence group.
        shard: this rank's place in its sequence group.
        sequence_dims: by key, the dimension to split, or None to leave an entry on every rank; see
            :func:`lightning_lss.sequence.batch.split_batch`.

    Raises:
        ValueError: if a named dimension does not exist.
    """
    dims = sequence_dims or {}

    def is_named(path: Path) -> bool:
        return not dims.keys().isdisjoint(path)

    def may_be_split(path: Path, x: Tensor) -> bool:
        return x.dim() <= MOST_DIMS and not is_named(path) and sequence_dim(path, x, dims) is not None

    unnamed = {path: x.size(1) for path, x in tensors_by_path(batch) if may_be_split(path, x)}
    lengths = Counter(unnamed.values())
    length = max(lengths, key=lambda n: (lengths[n], n), default=0)

    def shown(path: Path, x: Tensor) -> Tensor:
        dim = sequence_dim(path, x, dims)
        if dim is None or not (is_named(path) or unnamed.get(path) == length):
            return x
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"sequence_dims names dimension {dim} of {path[-1]!r}, which has the shape {tuple(x.shape)}."
            )
        dim %= x.dim()
        return split(x, Placement(dim, x.size(dim), shard)) if x.size(dim) >= shard.size else x

    return map_tensors(batch, shown)


@contextmanager
def splitting_blocks(module: nn.Module, shard_now: Callable[[], SequenceShard]) -> Generator[None, None, None]:
    """Split what the repeated blocks of ``module`` are given whole, within the ``with`` statement.

    A sequence that is made in a model, such as the patches of an image and a class token, is whole until then. It may be
    split anywhere, since that changes nothing that is computed.
    """

    def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        shard, given = shard_now(), [*args, *kwargs.values()]
        if shard.size == 1 or any(isinstance(x, SplitTensor) for x in given):
            return None
        first = next((x for x in given if _is_sequence(x, shard)), None)
        if first is None:
            return None
        parted = split(first, Placement(1, first.size(1), shard))
        own_args = tuple(parted if x is first else x for x in args)
        return own_args, {name: parted if x is first else x for name, x in kwargs.items()}

    with ExitStack() as stack:
        for block in repeated_blocks(module):
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _is_sequence(x: Any, shard: SequenceShard) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point() and x.size(1) >= shard.num_chunks


def gather_whole(outputs: Any) -> Any:
    """Gather all SplitTensors in nested containers; every rank must call it."""
    return map_tensors(outputs, lambda path, x: whole(x))
