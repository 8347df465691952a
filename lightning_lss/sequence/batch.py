"""Splitting a batch along the sequence, and checking that a sequence group works on one batch."""

import copy
import dataclasses
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.sequence.segment import SequenceShard

Key = str | int
Path = tuple[Key, ...]
SequenceDims = Mapping[Key, int | None]

DEFAULT_DIM = 1


class BatchMask(ABC):
    """What is asked of an attention mask in a batch, which every rank is given whole; see
    :class:`~lightning_lss.AttentionMask`."""

    rows: int
    num_queries: int | None
    num_keys: int | None

    @property
    @abstractmethod
    def content_digest(self) -> int:
        """Hash of what the mask shows, 63 bits."""

    @property
    @abstractmethod
    def digest(self) -> bytes:
        """The same within this process, where masks can be told apart by more."""

    @abstractmethod
    def select(self, positions: Tensor) -> "BatchMask":
        """The mask of the sequence that consists of ``positions``, int64 [n]."""

    @abstractmethod
    def chunk_work(self, length: int, num_chunks: int, *, batch: int | None = None) -> Any:
        """The ``pairs`` [C] and the ``keys`` [C, C] of each of ``num_chunks`` C equal chunks of sequences of ``length``, the
        pairs of all rows of a ``batch``."""


def split_batch(batch: Any, shard: SequenceShard, sequence_dims: SequenceDims | None = None) -> Any:
    """Cut a batch to this rank's segment.

    Tensors with two or more dimensions are cut along dimension 1 (``[batch, length, ...]``); others stay whole, and so do
    attention masks. All may
    be nested in dicts, dict-like containers, lists, tuples, namedtuples and dataclasses, which keep their types. What was
    cut is contiguous.

    Args:
        batch: a batch of the data loader, with whole sequences.
        shard: the rank's place in its sequence group.
        sequence_dims: by key (index in a list or tuple, field of a dataclass), the dimension to cut, or None to leave a
            tensor whole. A key holds for everything below it; the innermost one counts.

    Returns:
        a new batch, or ``batch`` itself where S = 1.

    Raises:
        ValueError: before anything is cut, if tensors disagree on the size of the default dimension, a length cannot be
            divided evenly, or a named dimension does not exist. The message names keys and shapes.
    """
    if shard.size == 1:
        return batch
    dims = sequence_dims or {}
    _check(list(tensors_by_path(batch)), shard, dims)

    def split(path: Path, tensor: Tensor) -> Tensor:
        dim = sequence_dim(path, tensor, dims)
        return tensor if dim is None else shard.split(tensor, dim)

    return map_tensors(batch, split)


def _check(leaves: list[tuple[Path, Tensor]], shard: SequenceShard, dims: SequenceDims) -> None:
    unknown = set(dims) - {key for path, _ in leaves for key in path}
    if unknown:  # no error: batches of other stages may have other entries
        warnings.warn(f"sequence_dims names {sorted(map(str, unknown))}, which the batch does not have.", stacklevel=3)
    cuts = [(path, tensor, dim) for path, tensor in leaves if (dim := sequence_dim(path, tensor, dims)) is not None]
    for path, tensor, dim in cuts:
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(
                f"sequence_dims names dimension {dim} of {show_entry(path, tensor)}, which has {tensor.dim()} dimensions."
            )
    unnamed = [(path, tensor) for path, tensor, _ in cuts if dims.keys().isdisjoint(path)]
    if len({tensor.size(DEFAULT_DIM) for _, tensor in unnamed}) > 1:
        entries = "; ".join(show_entry(path, tensor) for path, tensor in unnamed)
        raise ValueError(
            f"Tensors of the batch disagree on the sequence length (dimension {DEFAULT_DIM}): {entries}. Say which dimension is the"
            " sequence, or None for a tensor that every rank needs whole, with LSSStrategy(sequence_dims={key: dimension or None}), or"
            " define shard_batch(self, batch, shard) on the LightningModule."
        )
    for path, tensor, dim in cuts:
        try:
            shard.check_length(tensor.size(dim))
        except ValueError as error:
            key = repr(path[-1]) if path else "key"
            in_dict = "" if path else "let the loader give the batch in a dict, and "
            raise ValueError(
                f"Batch entry {show_entry(path, tensor)}, dimension {dim}: {error} To have sequences filled up, {in_dict}say with what:"
                f" LSSStrategy(pad_values={{{key}: value, ...}}). If another dimension is the sequence, or none is, {how_to_name(path)}."
            ) from None


def sequence_dim(path: Path, tensor: Tensor, dims: SequenceDims) -> int | None:
    """Find the dimension along which :func:`split_batch` cuts the entry at ``path``; None leaves it whole.

    Nested and sparse tensors are left whole.
    """
    is_dense = tensor.layout == torch.strided and not tensor.is_nested
    default = DEFAULT_DIM if is_dense and tensor.dim() > DEFAULT_DIM else None
    return next((dims[key] for key in reversed(path) if key in dims), default)


def sequences_by_path(batch: Any, dims: SequenceDims | None) -> dict[Path, tuple[Tensor, int]]:
    """Find the entries of a batch that have a sequence, each with its dimension."""
    found = ((path, x, sequence_dim(path, x, dims or {})) for path, x in tensors_by_path(batch))
    return {path: (x, dim) for path, x, dim in found if dim is not None and -x.dim() <= dim < x.dim()}


def how_to_name(path: Path) -> str:
    """Say what to write so that the entry at ``path`` is cut along another dimension or not at all."""
    if not path:  # a batch that is one tensor has no key
        return "define shard_batch(self, batch, shard) on the LightningModule"
    return f"write LSSStrategy(sequence_dims={{{path[-1]!r}: dimension or None}})"


def show_entry(path: Path, tensor: Tensor) -> str:
    """Name a batch entry in a message, with its shape."""
    return f"{'.'.join(map(str, path)) or 'batch'} {tuple(tensor.shape)}"


def _children(node: Any) -> list[tuple[Key, Any]] | None:
    """Keys and values of a container; None for anything else."""
    if isinstance(node, (Tensor, BatchMask)):
        return None
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, Mapping) or (hasattr(node, "keys") and hasattr(node, "__getitem__")):
        return [(key, node[key]) for key in list(node.keys())]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _entries_by_path(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield everything in a batch that is not a container, in any nesting, with the keys that lead to each."""
    children = _children(node)
    if children is None:
        yield path, node
    for key, child in children or ():
        yield from _entries_by_path(child, (*path, key))


def tensors_by_path(batch: Any) -> Iterator[tuple[Path, Tensor]]:
    """Yield all tensors of a batch, in any nesting, with the keys that lead to each."""
    return ((path, x) for path, x in _entries_by_path(batch) if isinstance(x, Tensor))


def masks_by_path(batch: Any) -> Iterator[tuple[Path, BatchMask]]:
    """Yield all attention masks of a batch, in any nesting, with the keys that lead to each."""
    return ((path, x) for path, x in _entries_by_path(batch) if isinstance(x, BatchMask))


def map_tensors(batch: Any, function: Callable[[Path, Tensor], Tensor]) -> Any:
    """Copy nested containers with ``function`` applied to every tensor; other entries are returned unchanged."""
    return map_entries(batch, lambda path, x: function(path, x) if isinstance(x, Tensor) else x)


def map_entries(node: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Copy nested containers with ``function`` applied to everything that is not a container."""
    children = _children(node)
    if children is None:
        return function(path, node)
    mapped = [(key, map_entries(child, function, (*path, key))) for key, child in children]
    if isinstance(node, (list, tuple)):
        values = [value for _, value in mapped]
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    if isinstance(node, Mapping) and not isinstance(node, (dict, UserDict)):
        return type(node)(dict(mapped))  # type: ignore[call-arg]  # its copy may share the entries
    new = copy.copy(node)
    for key, value in mapped:
        if hasattr(node, "keys"):
            new[key] = value
        else:
            object.__setattr__(new, str(key), value)  # a dataclass, perhaps frozen
    return new


def batch_digest(batch: Any) -> int:
    """Hash every tensor in a batch (path, shape, dtype and bytes), and every attention mask, to 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for path, tensor in tensors_by_path(batch):
        for x in _dense_parts(tensor.detach()):
            digest.update(repr((path, tuple(x.shape), str(x.dtype))).encode())
            digest.update(bytes_of(x))
    for path, mask in masks_by_path(batch):
        digest.update(repr((path, mask.content_digest)).encode())
    return int.from_bytes(digest.digest(), "big") >> 1


def _dense_parts(x: Tensor) -> Sequence[Tensor]:
    """What a nested or a sparse tensor is made of; any other tensor itself."""
    if x.is_nested:
        return x.unbind()
    if x.layout != torch.strided:
        entries = x.to_sparse_coo().coalesce()
        return [entries.indices(), entries.values(), torch.tensor(x.shape)]
    return [x]


def bytes_of(x: Tensor) -> bytes:
    """The bytes of a tensor of any strides and dtype, in the order of its elements."""
    x = x.detach().cpu()
    return (
        x.new_empty(x.numel()).copy_(x.flatten()).view(torch.uint8).numpy().tobytes()
    )  # a view of [1] may have any stride


def is_same_batch(batch: Any, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether all ranks of ``group`` were given the same batch; every rank must call it."""
    digest = batch_digest(batch)
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return int(extremes.sum()) == 0  # the highest digest less the lowest


def check_same_batch(batch: Any, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare ``batch`` over the ranks of ``group``; every rank must call it.

    Raises:
        ValueError: on every rank, if the batches of any two differ. The message names the likely causes.
    """
    if not is_same_batch(batch, group, device):
        raise ValueError(
            "The ranks of one sequence group were given different batches, but they must work on segments of the same one. Likely causes:"
            " a DistributedSampler of your own (let Lightning make it, or build it from trainer.distributed_sampler_kwargs); a"
            " RandomSampler or shuffle=True with use_distributed_sampler=False and no seed (call seed_everything(seed, workers=True));"
            " random augmentation from an unseeded generator; or an IterableDataset that splits its data by global rank (split it by"
            " trainer.strategy.data_rank of trainer.strategy.data_parallel_size)."
        )
