"""Watch the operators that torch runs, and count the collectives among them by phase, operation, dtype and bytes."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lss.sequence.collectives import resolve_group

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


def is_own_operator(func: Any) -> bool:
    """Tell whether lightning_lss has registered the operator, and it does more than compute entry by entry: attention does."""
    return func.namespace == "lightning_lss" and torch.Tag.pointwise not in func.tags


def run_inside(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operator's Python code with ``mode`` active, so that its tensors and collectives are seen as well."""
    device = _tensors(args)[0].device.type.upper()
    keys = torch._C.DispatchKeySet(torch._C._parse_dispatch_key(device))  # type: ignore[arg-type]
    with mode:
        return func.redispatch(keys, *args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Call ``see(func, args, result)`` after every operator that is run within, also inside operators of lightning_lss.
    A DTensor is seen as its local tensors."""

    def __init__(self, see: Callable[[Any, tuple[Any, ...], Any], object]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and tell."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes back with its local tensors
        if is_own_operator(func):
            return run_inside(self, func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        self._see(func, args, result)
        return result


class Collective(NamedTuple):
    """What is counted together."""

    phase: str
    kind: str
    dtype: torch.dtype
    received: int
    """Bytes that this rank receives."""


Tally = Counter[Collective]


class CollectiveCounter(Watch):
    """Count in ``tally`` the collectives that are run within, except those that receive nothing.

    Set ``phase`` when the next phase of a step begins.
    """

    def __init__(self, phase: str = "forward") -> None:
        super().__init__(self._count)
        self.phase = phase
        self.tally: Tally = Counter()

    def _count(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if found := payload_of(func, args, result):
            received = int(received_of(*found, _group_size(args)))
            self.tally[Collective(self.phase, found[0], _tensors((*args, result))[0].dtype, received)] += 1


def payload_of(func: Any, args: tuple[Any, ...], result: Any) -> tuple[str, int] | None:
    """Return the kind of a collective and the bytes of its payload, or None for an operator that receives nothing.

    The payload is the tensor that is summed or received, or the whole of what is gathered or scattered: the larger of
    output and input, in whatever order they come. Raises ``RuntimeError`` for a collective that is not in the table.
    """
    namespace, _, name = func._schema.name.partition("::")
    if namespace not in _NAMESPACES:
        return None
    if name not in _KINDS:
        raise RuntimeError(f"The counter does not know the collective {func}: add it to its table.")
    kind = _KINDS[name]
    parts = args[:1] if kind in ("all_reduce", "receive", "broadcast") else (*args, result)
    return (kind, max(sum(x.nbytes for x in _tensors(part)) for part in parts)) if kind else None


def received_of(kind: str, payload: float, ranks: int) -> float:
    """Return the bytes of a payload that a rank has to receive from the others, in a ring of ``ranks``."""
    if kind in ("receive", "broadcast"):
        return payload
    return (2 if kind == "all_reduce" else 1) * payload * (ranks - 1) / ranks


def kinds(tally: Tally, phase: str | None = None) -> Counter[str]:
    """Count the collectives of each kind, in one phase or all."""
    return Counter(x.kind for x in tally.elements() if phase in (None, x.phase))


def total_bytes(tally: Tally, phase: str | None = None) -> int:
    """Sum the bytes received, in one phase or all."""
    return sum(x.received for x in tally.elements() if phase in (None, x.phase))


def describe(tally: Tally, phase: str) -> str:
    """Name the collectives of a phase, such as ``1 all_gather + 1 reduce_scatter``."""
    return " + ".join(f"{number} {kind}" for kind, number in sorted(kinds(tally, phase).items()))


def _group_size(args: tuple[Any, ...]) -> int:
    """Return the size of the group that a collective is given, as an object or, last of its strings, by name."""
    if names := [part for part in args if isinstance(part, str)]:
        return resolve_group(names[-1]).size()
    for part in args:
        if isinstance(part, dist.ProcessGroup):
            return part.size()
        if isinstance(part, torch.ScriptObject):
            with suppress(RuntimeError):  # of another class, such as the operation of a reduction
                return dist.ProcessGroup.unbox(part).size()
    raise RuntimeError(f"No process group is among the arguments of a collective: {[type(x) for x in args]}.")


def _tensors(part: Any) -> list[Tensor]:
    return [x for x in tree_leaves(part) if isinstance(x, Tensor)]
