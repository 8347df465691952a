"""Count what a rank sends and receives: every collective that torch dispatches, by phase, operation, dtype and bytes."""

from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_lss.sequence.collectives import resolve_group
from lightning_lss.testing.dispatch import Watch

# Names in the c10d namespace (collectives in place) and in _c10d_functional (DTensor's), torch 2.11 to 2.13.
_NAMES = {
    "all_gather": "allgather_ _allgather_base_ allgather_into_tensor_coalesced_ all_gather_into_tensor"
    " all_gather_into_tensor_out all_gather_into_tensor_coalesced",
    "reduce_scatter": "reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_ reduce_scatter_tensor"
    " reduce_scatter_tensor_out reduce_scatter_tensor_coalesced",
    "all_reduce": "allreduce_ allreduce_coalesced_ all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_",
    "all_to_all": "alltoall_ alltoall_base_ all_to_all_single shard_dim_alltoall",
    "broadcast": "broadcast_ broadcast",
    "receive": "recv_ irecv",
    "": "send isend barrier monitored_barrier_ wait_tensor _wrap_tensor_autograd",  # these receive no payload
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


class Collective(NamedTuple):
    """What is told apart: the phase of the step, the kind as in the table, the dtype that is sent, and the bytes that
    this rank receives."""

    phase: str
    kind: str
    dtype: torch.dtype
    received: int


Tally = Counter[Collective]
"""How many collectives of each sort there were."""


class CollectiveCounter(Watch):
    """Counts the collectives that are dispatched while it is active, without barriers and what a rank sends to one
    other: the other receives it. A collective that is not in the table raises ``RuntimeError``.

    Bytes are the payload that a rank has to receive from others in a ring: (n - 1) / n of an all-gather's output, a
    reduce-scatter's input or an all-to-all's input, and twice that of an all-reduce's tensor, in a group of n ranks.

    Args:
        phase: what is counted first; set the attribute to go on to another.
    """

    def __init__(self, phase: str = "forward") -> None:
        super().__init__(self._count)
        self.phase = phase
        self.tally: Tally = Counter()

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        found = payload_of(func, args, result)
        if found is not None:
            kind, payload = found
            received = int(received_of(kind, payload, _group_size(args)))
            self.tally[Collective(self.phase, kind, _tensors((*args, result))[0].dtype, received)] += 1


def payload_of(func: Any, args: tuple[Any, ...], result: Any) -> tuple[str, int] | None:
    """The kind of a collective and the bytes of its payload, None for any other operator.

    The payload is the whole of what is gathered or scattered, or the tensor that is summed or received. For gathers and
    scatters the larger of output and input is the whole, in whatever order the operation takes them.

    Args:
        func: an operator, as dispatch modes see it.
        args: its positional arguments.
        result: what it has returned.

    Raises:
        RuntimeError: if it is a collective that is not in the table.
    """
    namespace, _, name = func._schema.name.partition("::")
    if namespace not in _NAMESPACES:
        return None
    if name not in _KINDS:
        raise RuntimeError(f"The counter does not know the collective {func}: add it to its table.")
    kind = _KINDS[name]
    if not kind:  # it receives no payload
        return None
    if kind in ("all_reduce", "receive", "broadcast"):
        return kind, _nbytes(args[0])
    return kind, max(_nbytes(part) for part in (*args, result))


def received_of(kind: str, payload: float, ranks: int) -> float:
    """Bytes of a payload that a rank has to receive from others, in a ring of ``ranks``."""
    if kind in ("receive", "broadcast"):
        return payload
    return (2 if kind == "all_reduce" else 1) * payload * (ranks - 1) / ranks


def kinds(tally: Tally, phase: str | None = None) -> dict[str, int]:
    """How many collectives of each kind there were, in one phase or all."""
    numbers: Counter[str] = Counter()
    for collective, number in tally.items():
        if phase in (None, collective.phase):
            numbers[collective.kind] += number
    return dict(numbers)


def total_bytes(tally: Tally, phase: str | None = None) -> int:
    """Bytes received, in one phase or all."""
    return sum(x.received * number for x, number in tally.items() if phase in (None, x.phase))


def describe(tally: Tally, phase: str) -> str:
    """The collectives of a phase, such as ``1 all_gather + 1 reduce_scatter``."""
    return " + ".join(f"{number} {kind}" for kind, number in sorted(kinds(tally, phase).items()))


def _group_size(args: tuple[Any, ...]) -> int:
    """Ranks of the group that a collective is given, as an object or, last of its strings, by name."""
    names = [part for part in args if isinstance(part, str)]
    if names:
        return resolve_group(names[-1]).size()
    for part in args:
        if isinstance(part, dist.ProcessGroup):
            return part.size()
        if isinstance(part, torch.ScriptObject):
            with suppress(RuntimeError):  # of another class, such as the operation of a reduction
                return dist.ProcessGroup.unbox(part).size()
    raise RuntimeError(f"No process group is among the arguments of a collective: {[type(x) for x in args]}.")


def _nbytes(part: Any) -> int:
    return sum(x.nbytes for x in _tensors(part))


def _tensors(part: Any) -> list[Tensor]:
    return [x for x in tree_leaves(part) if isinstance(x, Tensor)]
