"""Follow one training step operator by operator: the memory it holds, its operations and its collectives."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_lss.attention.kernels import Scores, Segments
from lightning_lss.planner.trace import COLLECTIVES, PARTS, STAGES, WORK, Trace
from lightning_lss.testing.collectives import is_own_operator, payload_of, run_inside

_PART = {name: index for index, name in enumerate(PARTS)}
_ACTIVATIONS = _PART["activations"]
_MATMUL, _ATTENTION, _WRITTEN, _KERNELS = range(len(WORK))
_OF_LOGITS = ("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward")
# There are no contents to copy or to wait for. Torch's fake of a wait would return another tensor.
_CHANGES_NOTHING = (torch.ops.aten.copy_.default, torch.ops._c10d_functional.wait_tensor.default)
_UNKNOWN_TO_FAKES = (
    torch.ops.c10d.allgather_into_tensor_coalesced_.default,
    torch.ops.c10d.reduce_scatter_tensor_coalesced_.default,
)
_LEAST_PAYLOAD = 64  # bytes: smaller messages are token counts or metrics


class Tracker(TorchDispatchMode):
    """Follow every storage until it is freed, and add up operations.

    The step is cut into *stretches*: the allocations of one autograd function, forward or backward, are one stretch. So
    a loop inside a function (over tiles, rows of logits, ranks) counts once, and steps of different lengths have the
    same stretches. The tracker keeps the highest moment of each.

    It does not see what a C++ operator allocates for itself and frees before it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = 0
        self._live: dict[int, tuple[int, int, Any]] = {}  # by storage: bytes, part, weak reference
        self._now = [0] * len(PARTS)
        self._highest: list[list[int]] = []  # of each stretch, by part
        self._stages: list[int] = []
        self._stretch: Any = None
        self._work = np.zeros((len(STAGES), len(WORK)))
        self._collectives: list[list[float]] = []
        self._kinds: list[str] = []
        self._in_flight: dict[int, tuple[int, np.ndarray]] = {}  # by storage: index of the collective, work before it
        self._sent_at: np.ndarray | None = None  # work before the last collective

    def hold(self, tensors: Iterable[Tensor], part: str = "activations") -> None:
        """Count tensors under ``part``, whether they are new or were counted as activations."""
        for tensor in tensors:
            self._hold(tensor, _PART[part])
            self.relabel(tensor, part)

    def relabel(self, tensor: Tensor, part: str) -> None:
        """Count a tensor under ``part`` if it was counted as an activation."""
        key = tensor.untyped_storage()._cdata
        if key in self._live and self._live[key][1] == _ACTIVATIONS:
            size, _, reference = self._live[key]
            self._live[key] = (size, _PART[part], reference)
            self._now[_ACTIVATIONS] -= size
            self._now[_PART[part]] += size

    def add_attention(
        self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, backward: bool, segments: Segments | None = None
    ) -> None:
        """Count the operations of queries [B, H, m, D] over keys [B, G, n, D] and values [B, G, n, Dv]: 4 for each pair
        that the kernel computes and channel, 8 backward. A bias hides pairs, but they are computed."""
        sizes = [(q.size(-2), k.size(-2))] if segments is None else segments.sizes
        pairs = sum(scores.pairs(*size) for size in sizes)
        channels = q.size(0) * q.size(1) * (q.size(-1) + v.size(-1))
        self._work[self.stage, _ATTENTION] += 2.0 * channels * pairs * (2 if backward else 1)
        self._work[self.stage, _KERNELS] += 1

    def result(self, parameters: np.ndarray) -> Trace:
        """Return the trace of the step; ``parameters`` is :attr:`Trace.parameters`."""
        moments, stages = np.array(self._highest, dtype=float), np.array(self._stages)
        collectives = np.array(self._collectives, dtype=float).reshape(-1, len(COLLECTIVES))
        return Trace(moments, stages, self._work, collectives, np.array(self._kinds, dtype=str), parameters)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its memory, work and payload."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # the most frequent call
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again with local tensors
        if is_own_operator(func):
            return run_inside(self, func, args, kwargs)
        if func in _CHANGES_NOTHING:
            result = args[0]
        elif func in _UNKNOWN_TO_FAKES:
            result = FakeWork().boxed()
        else:
            result = func(*args, **(kwargs or {}))
        part = _ACTIVATIONS if STAGES[self.stage] != "optimizer" else _PART["optimizer"]
        fresh = [x for x in _tensors(result) if self._hold(x, part)]
        collective = payload_of(func, args, result)
        if collective is not None:
            self._send(*collective, args, result)
        elif func.namespace not in ("c10d", "_c10d_functional"):
            if self._in_flight:
                self._arrive(args)
            self._count(func, args, kwargs or {}, result, fresh)
        return result

    # -- memory --------------------------------------------------------------------------------------------------------

    def _hold(self, tensor: Tensor, part: int) -> bool:
        """Count the tensor's storage under ``part``; return whether it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return False
        self._live[key] = (size, part, weakref.ref(storage, partial(self._free, key)))
        self._now[part] += size
        node = torch._C._current_autograd_node()
        place = (node.name(), node._sequence_nr()) if node is not None else None
        stretch = (self.stage, place, torch.autograd._get_sequence_nr())
        if stretch != self._stretch:
            self._stretch = stretch
            self._highest.append(list(self._now))
            self._stages.append(self.stage)
        elif sum(self._now) > sum(self._highest[-1]):
            self._highest[-1] = list(self._now)
        return True

    def _free(self, key: int, _: Any) -> None:
        size, part, _ = self._live.pop(key)
        self._now[part] -= size
        self._in_flight.pop(key, None)

    # -- collectives ---------------------------------------------------------------------------------------------------

    def _send(self, kind: str, payload: int, args: Any, result: Any) -> None:
        """Note a collective; consecutive messages without work between them are one."""
        if payload < _LEAST_PAYLOAD:
            return
        before = self._work.sum(0)
        idle = self._sent_at is not None and self._sent_at[_KERNELS] == before[_KERNELS]
        if kind == "receive" and idle and self._kinds[-1] == kind:
            self._collectives[-1][:2] = self._collectives[-1][0] + 1, self._collectives[-1][1] + payload
        else:
            self._kinds.append(kind)
            self._collectives.append([1, payload, 0, 0, 0, self.stage])
        self._sent_at = before
        for tensor in _tensors((args, result)):
            self.relabel(tensor, "kv_buffers")
            self._in_flight[tensor.untyped_storage()._cdata] = (len(self._kinds) - 1, before)

    def _arrive(self, args: Any) -> None:
        """Note the work that can hide each collective whose result is among ``args``: all work until this first use."""
        for tensor in _tensors(args):
            index, before = self._in_flight.pop(tensor.untyped_storage()._cdata, (None, None))
            if index is not None:
                done = self._work.sum(0) - before
                self._collectives[index][2:5] = done[:3]

    # -- work ----------------------------------------------------------------------------------------------------------

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, fresh: list[Tensor]) -> None:
        name = func._schema.name.rpartition("::")[2]
        written = fresh or (_tensors(args)[:1] if func._schema.is_mutable else [])
        if written:
            self._work[self.stage, _WRITTEN] += sum(x.nbytes for x in written)
            self._work[self.stage, _KERNELS] += 1
        if "scaled_dot_product" in name:
            given = {argument.name: x for argument, x in zip(func._schema.arguments, args)} | kwargs
            q, k, v = (given[x] for x in ("query", "key", "value"))
            self.add_attention(q, k, v, Scores(1.0, given.get("is_causal", False)), "backward" in name)
        elif "linear_cross_entropy" in name:
            rows, weight = args[0], args[1]
            self._work[self.stage, _MATMUL] += 6.0 * rows.numel() * weight.size(0)  # with both gradients
        elif func._overloadpacket in flop_registry:
            self._work[self.stage, _MATMUL] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        elif name in _OF_LOGITS:
            for x in (args[0], *_tensors(result)):
                self.relabel(x, "logits")


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
