"""Filling the sequences of a batch up to a length that can be divided."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.batch import (
    DEFAULT_DIM,
    Key,
    Path,
    SequenceDims,
    map_tensors,
    sequences_by_path,
    show_entry,
    tensors_by_path,
)
from lightning_lss.sequence.segment import SequenceShard

PadValues = Mapping[Key, float]
"""By key of a batch entry (or of what it lies in), what its sequences are filled up with."""


def check_values(values: object) -> None:
    """Raise ``ValueError`` unless they are :data:`PadValues`, or None."""
    are_numbers = isinstance(values, Mapping) and all(isinstance(x, (int, float)) for x in values.values())
    if values is not None and not are_numbers:
        raise ValueError(
            f"pad_values={values!r} must be numbers by batch entry, such as {{'inputs': 0, 'targets': -100}}."
        )


def padding_of(batch: Any, num_chunks: int, values: PadValues, dims: SequenceDims | None) -> int:
    """Return how many positions the sequences of a batch lack so that they can be cut into ``num_chunks`` equal chunks.

    Raises:
        ValueError: if an entry has no value to be filled up with, or one that its dtype cannot hold, or entries lack
            different numbers of positions.
    """
    cuts = sequences_by_path(batch, dims)
    unknown = set(values) - {key for path, _ in tensors_by_path(batch) for key in path}
    if unknown:  # no error: batches of other stages may have other entries
        warnings.warn(f"pad_values names {sorted(map(str, unknown))}, which the batch does not have.", stacklevel=2)
    lacking = {path: -x.size(dim) % num_chunks for path, (x, dim) in cuts.items()}
    if not any(lacking.values()):
        return 0
    if len(set(lacking.values())) > 1:
        entries = "; ".join(f"{show_entry(path, cuts[path][0])} lacks {n}" for path, n in lacking.items())
        raise ValueError(
            f"pad_values fills all sequences of a batch up by one number of positions, to a multiple of {num_chunks}, but {entries}. Pad"
            " the shorter ones in the collate function, or leave an entry whole with LSSStrategy(sequence_dims={key: None})."
        )
    for path, (x, _) in cuts.items():
        _check(path, x, values, num_chunks)
    return next(iter(lacking.values()))


def pad_batch(batch: Any, padding: int, values: PadValues, dims: SequenceDims | None) -> Any:
    """Append ``padding`` positions to the sequences of a batch; see :func:`padding_of`."""
    cuts = sequences_by_path(batch, dims) if padding else {}

    def padded(path: Path, x: Tensor) -> Tensor:
        if path not in cuts:
            return x
        dim = cuts[path][1]
        shape = [padding if d == dim % x.dim() else n for d, n in enumerate(x.shape)]
        value = _value(path, values)
        assert value is not None  # or padding_of has raised
        return torch.cat([x, x.new_full(shape, value)], dim)

    return map_tensors(batch, padded) if cuts else batch


def _value(path: Path, values: PadValues) -> float | None:
    return next((values[key] for key in reversed(path) if key in values), None)


def _check(path: Path, x: Tensor, values: PadValues, num_chunks: int) -> None:
    value, entry = _value(path, values), show_entry(path, x)
    if value is None:
        raise ValueError(
            f"Batch entry {entry} cannot be cut into {num_chunks} equal chunks, and pad_values={dict(values)} does not say what to fill"
            f" it up with. {_how_to_add(path)}."
        )
    rounds = x.is_floating_point() or x.is_complex()
    if not rounds and torch.tensor(value).to(x.dtype).item() != value:
        raise ValueError(f"pad_values: {x.dtype} of batch entry {entry} cannot hold {value!r}. Choose another value.")


def _how_to_add(path: Path) -> str:
    return (
        f"Add {path[-1]!r}: value"
        if path
        else "A batch that is one tensor has no key: let the loader give it in a dict"
    )


def cut_padding(outputs: Any, shard: SequenceShard, batch: Any, dims: SequenceDims | None) -> Any:
    """Take the padding at the end of the sequences from what was computed of a segment.

    Args:
        outputs: tensors in any nesting; those lose padding that have as many rows as the batch, and in dimension 1 as many
            positions as the segment.
        shard: that of the batch.
        batch: this rank's part.
        dims: see :func:`lightning_lss.sequence.batch.split_batch`.
    """
    cuts = sequences_by_path(batch, dims).values() if shard.padding else ()
    local = {(x.size(0), x.size(dim)) for x, dim in cuts if x.size(dim) != shard.true_length(x.size(dim))}

    def cut(path: Path, x: Tensor) -> Tensor:
        if tuple(x.shape[: DEFAULT_DIM + 1]) not in local:
            return x
        return x[:, shard.valid(x.size(DEFAULT_DIM), x.device)]

    return map_tensors(outputs, cut) if local else outputs
