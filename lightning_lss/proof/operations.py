"""Find the operations of a step whose results on a segment are not those of the whole sequence.

The whole pass records the result of every torch function that the user's code calls. The split pass compares each result
with its part of the recorded one, and goes on with that part: an operation that differs is then itself at fault, not one
before it, and all faults of a step are found at once.
"""

import linecache
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lss.sequence.batch import tensors_by_path
from lightning_lss.sequence.segment import SequenceShard


class Argument(NamedTuple):
    """A tensor that an operation was given."""

    shape: tuple[int, ...]
    whole_shape: tuple[int, ...] | None
    """In the whole pass."""
    is_floating: bool
    name: str
    """Of the parameter, buffer or batch entry that it is, or empty."""


class Fault(NamedTuple):
    """An operation that gives a segment something else than its part of the whole result."""

    order: int
    """Which operation of the whole pass it is."""
    operation: str
    """Name of the torch function."""
    module: str
    """Name of the innermost module that runs it, or its class for the outermost."""
    file: str
    line: int
    arguments: tuple[Argument, ...]
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...]
    error: float
    """Relative error of the result; infinite where its shape is none that a part of the whole could have."""
    message: str = ""
    """Of the exception that the operation raised."""

    @property
    def source(self) -> str:
        """The line of code."""
        return linecache.getline(self.file, self.line).strip()


class _Call(NamedTuple):
    order: int
    results: list[Tensor]
    shapes: list[tuple[int, ...]]


_LIBRARIES = tuple(
    os.path.join(root, name) + os.sep
    for root in {os.path.dirname(os.path.dirname(torch.__file__)), sysconfig.get_path("stdlib")}
    for name in ("torch", "einops", "opt_einsum", "contextlib", "functools")
)
_LIGHTNING = os.path.dirname(lightning.__file__) + os.sep
_DEMOS = os.path.join(_LIGHTNING, "pytorch", "demos") + os.sep
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep
_MODELS = os.path.join(_OWN, "models") + os.sep
_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_|__i(add|sub|mul|truediv|floordiv|and|or|xor|pow|mod|lshift|rshift)__")
_UNSEEN = {"__get__", "__set__", "backward", "requires_grad_", "detach_", "register_hook", "tolist", "item", "numpy"}


def _place(depth: int) -> tuple[str, int] | None:
    """Return file and line of the user's code that has called the operation; None for code of this package, which is known
    to be right."""
    frame = sys._getframe(depth)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES) and (not file.startswith(_LIGHTNING) or file.startswith(_DEMOS)):
            is_own = file.startswith(_OWN) and not file.startswith(_MODELS)
            return None if is_own else (file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Record(TorchFunctionMode):
    """Record the results of all operations that the user's code runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], _Call] = {}
        self.outputs: dict[tuple[str, int], list[Tensor]] = {}
        """Results of modules, by name and number of the call."""
        self._hooks = ExitStack()

    def start(self, module: nn.Module, batch: Any) -> None:
        """Begin with a step of ``module`` on ``batch``."""
        self._module, self._count = module, Counter[Any]()
        self._names = {id(part): name or type(module).__name__ for name, part in module.named_modules()}
        self._path = [type(module).__name__]
        self._entries = {_storage(x): ".".join(map(str, path)) or "batch" for path, x in tensors_by_path(batch)}

    @property
    def inputs(self) -> set[str]:
        """Names of the batch entries."""
        return set(self._entries.values())

    def __enter__(self) -> "Record":
        before = register_module_forward_pre_hook(lambda part, _: self._path.append(self._names.get(id(part), "")))
        after = register_module_forward_hook(self._leave, always_call=True)
        for handle in (before, after):
            self._hooks.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def _leave(self, part: nn.Module, inputs: Any, output: Any) -> None:
        name = self._path.pop()
        if name:
            self._see_output((name, self._number(name)), _tensors(output))

    def _see_output(self, key: tuple[str, int], tensors: list[Tensor]) -> None:
        self.outputs[key] = [x.detach().clone() for x in tensors]

    def _number(self, key: Any) -> int:
        self._count[key] += 1
        return self._count[key]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        place = None if name in _UNSEEN else _place(2)
        if place is None:
            return func(*args, **(kwargs or {}))
        key = (name, *place)
        return self._run((*key, self._number(key)), lambda: func(*args, **(kwargs or {})), _tensors((args, kwargs)))

    def _run(self, key: tuple[Any, ...], call: Callable[[], Any], arguments: list[Tensor]) -> Any:
        shapes = [tuple(x.shape) for x in arguments]
        result = call()
        if tensors := _tensors(result):
            self.calls[key] = _Call(len(self.calls), [x.detach().clone() for x in tensors], shapes)
        return result


class Comparison(Record):
    """Compare the operations that are run within with those of ``record``, and with ``repairs`` go on with this rank's part of its
    results."""

    def __init__(self, record: Record, shard: SequenceShard, length: int, tolerance: float, repairs: bool) -> None:
        super().__init__()
        self._repairs = repairs
        self.faults: list[Fault] = []
        self.errors: dict[str, float] = {}
        """The largest error of each module's output."""
        self._record, self._shard, self._length, self._tolerance = record, shard, length, tolerance
        self._tainted: dict[int, Tensor] = {}  # what depends on a result of no known shape

    def _see_output(self, key: tuple[str, int], tensors: list[Tensor]) -> None:
        for x, reference in zip(tensors, self._record.outputs.get(key, [])):
            error = self._nearest(x, reference)[0]
            if reference.dim() > 0:
                self.errors[key[0]] = max(error, self.errors.get(key[0], 0.0))

    def _run(self, key: tuple[Any, ...], call: Callable[[], Any], arguments: list[Tensor]) -> Any:
        known = self._record.calls.get(key)
        tainted = any(id(x) in self._tainted for x in arguments)
        try:
            result = call()
        except Exception as failure:
            if not tainted:
                self._find(key, arguments, known, torch.empty(0), None, float("inf"), str(failure))
            raise
        tensors = _tensors(result)
        if known is None or len(known.results) != len(tensors):
            if tainted:
                self._taint(tensors)
            return result
        parts = {}
        for x, reference in zip(tensors, known.results):
            error, part = self._nearest(x, reference)
            if reference.dim() == 0:
                continue  # a sum over the segment, as every loss is
            if error > self._tolerance and not tainted:
                self._find(key, arguments, known, x, reference, error)
            if part is None:
                self._taint([x])
            elif error > self._tolerance:
                parts[id(x)] = part.to(x.dtype)
        if not parts or not self._repairs:
            return result
        if _IN_PLACE.fullmatch(key[0]):
            with torch.no_grad():
                for x in tensors:
                    x.copy_(parts.get(id(x), x))
            return result
        return tree_map(lambda x: parts.get(id(x), x) if isinstance(x, Tensor) else x, result)

    def _taint(self, tensors: Sequence[Tensor]) -> None:
        self._tainted.update((id(x), x) for x in tensors)

    def _nearest(self, x: Tensor, reference: Tensor) -> tuple[float, Tensor | None]:
        """Return the error of ``x`` as this rank's part of ``reference``, and that part; None where it can be none."""
        found = [(_error(x, part), part) for part in self._parts(reference, x)]
        return min(found, key=lambda pair: pair[0], default=(float("inf"), None))

    def _parts(self, reference: Tensor, x: Tensor) -> Iterator[Tensor]:
        """Yield what this rank's part could be: along one dimension, which may be that of the sequence and others in one.

        Padding is as in ``x``, since one device has none.
        """
        if reference.shape == x.shape:
            yield reference
            return
        if reference.dim() != x.dim():
            return
        dims = [d for d in range(x.dim()) if reference.size(d) != x.size(d)]
        if len(dims) != 1:
            return
        dim, size = dims[0], reference.size(dims[0])
        views = [(size, 1)]
        if size > self._length and size % self._length == 0:
            views = [(size // self._length, self._length), (self._length, size // self._length), *views]
        for outer, inner in views:
            along = dim + 1 if inner == self._length and outer != self._length else dim
            try:
                part = self._shard.split(reference.unflatten(dim, (outer, inner)), along)
            except ValueError:  # not divisible
                continue
            if part.flatten(dim, dim + 1).shape == x.shape:
                yield self._with_padding_of(x.view_as(part), part, along).flatten(dim, dim + 1)

    def _with_padding_of(self, x: Tensor, part: Tensor, dim: int) -> Tensor:
        """Take the padding at the end of the sequence from ``x``: one device has none."""
        if not self._shard.padding:
            return part
        valid = self._shard.valid(part.size(dim), part.device)
        return part.where(valid.view([-1 if d == dim else 1 for d in range(part.dim())]), x)

    def _find(
        self,
        key: tuple[Any, ...],
        arguments: list[Tensor],
        known: _Call | None,
        result: Tensor,
        reference: Tensor | None,
        error: float,
        message: str = "",
    ) -> None:
        shapes = known.shapes if known is not None and len(known.shapes) == len(arguments) else [None] * len(arguments)
        own = (*self._module.named_parameters(), *self._module.named_buffers())
        names = self._record._entries | self._entries | {_storage(x): name for name, x in own}
        given = tuple(
            Argument(tuple(x.shape), shape, x.is_floating_point(), names.get(_storage(x), ""))
            for x, shape in zip(arguments, shapes)
        )
        order = known.order if known is not None else len(self._record.calls)
        whole_shape = () if reference is None else tuple(reference.shape)
        fault = Fault(
            order, key[0], self._path[-1], key[1], key[2], given, tuple(result.shape), whole_shape, error, message
        )
        self.faults.append(fault)


def _storage(x: Tensor) -> int:
    """Identify the memory of a tensor, also of a rank's part of a sharded one."""
    return getattr(x, "_local_tensor", x).untyped_storage().data_ptr()


def _error(x: Tensor, reference: Tensor) -> float:
    if not x.is_floating_point():
        return float((x != reference).double().mean()) if x.numel() else 0.0
    wide = torch.promote_types(x.dtype, torch.float32)
    x, reference = x.detach().to(wide), reference.to(wide)
    same = (x == reference) | (x.isnan() & reference.isnan())  # masks hold infinities
    difference = torch.where(same, 0, x - reference).norm()
    return (
        float(difference / torch.where(reference.isfinite(), reference, 0).norm().clamp(min=1e-30))
        if x.numel()
        else 0.0
    )


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
