"""Change one token: which outputs move on one rank, and which on all?"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lss.proof.batch import BatchProof
from lightning_lss.proof.operations import Record
from lightning_lss.proof.report import Leak
from lightning_lss.proof.shorten import sequence_dim_of
from lightning_lss.sequence.batch import Path, map_tensors, tensors_by_path

Outputs = dict[tuple[str, int], list[Tensor]]


def find_leaks(proof: BatchProof, length: int) -> Iterator[Leak]:
    """Change the middle position of every entry of the batch in turn; yield what moves of the last output that has the
    sequence. Every rank must consume all of them."""
    batch = proof.part(length)
    whole, split = _outputs(proof, batch, length)
    last = [key for key, tensors in whole.items() if tensors and length in tensors[0].shape and key in split]
    if not last:
        return
    key, dim = last[-1], list(whole[last[-1]][0].shape).index(length)
    for path, x in tensors_by_path(batch):
        along = sequence_dim_of(path, x, proof.dims)
        changed = None if along is None or x.size(along) != length else _changed(x, along, length // 2)
        if changed is None:
            continue
        other = map_tensors(batch, lambda at, y, path=path, changed=changed: changed if at == path else y)  # type: ignore[misc]
        whole_after, split_after = _outputs(proof, other, length)
        moved = _moved(whole[key][0], whole_after[key][0], dim)
        own = _moved(split[key][0], split_after[key][0], dim)
        found: list[Any] = [None] * proof.shard.size
        places = proof.shard.places((length + proof.shard.padding) // proof.shard.size)
        dist.all_gather_object(found, places[own].tolist(), group=proof.shard.require_group())
        yield Leak(_name(path), length // 2, key[0], moved, sorted(x for part in found for x in part if x < length))


def _outputs(proof: BatchProof, batch: Any, length: int) -> tuple[Outputs, Outputs]:
    """Run the step whole and split, and return the outputs of modules."""
    records = []
    for whole in (True, False):
        records.append(Record())
        proof.run(length, whole, records[-1], batch)
    return records[0].outputs, records[1].outputs


def _changed(x: Tensor, dim: int, position: int) -> Tensor | None:
    """Copy ``x`` with other values at a position; None where it has but one value."""
    new = x.clone()
    place = new.select(dim, position)
    if x.is_floating_point():
        place += 1
        return new
    others = x[x != place.flatten()[0]]
    if x.dtype == torch.bool or others.numel() == 0:
        return None
    place.fill_(others[0])
    return None if torch.equal(new, x) else new


def _moved(before: Tensor, after: Tensor, dim: int) -> list[int]:
    others = [d for d in range(before.dim()) if d != dim]
    return (before != after).any(others).nonzero().flatten().tolist() if others else []


def _name(path: Path) -> str:
    return ".".join(map(str, path)) or "batch"
