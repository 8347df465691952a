"""``SplitTensor``, and what a function of torch does with it.

A function that has a rule (the other modules of this folder) is computed on parts. One without is given whole tensors.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_lss.tensor.placement import Placement

Function = Callable[..., Any]


class SplitTensor(Tensor):
    """A tensor that shows itself as whole, and of which each rank of a sequence group holds its part.

    ``shape`` is that of the whole tensor, and every function of torch computes what it would of whole tensors: position
    by position on each rank's part, with communication where positions are mixed, and of a function that is not known
    on the whole tensor, on every rank. So code that was written for one device computes what it would there.

    Autograd sees the parts. As everywhere in this package, the gradients that a rank computes are its part of those of
    the mean of all ranks' losses, once the ranks have averaged them.
    """

    placement: Placement
    slice_of: "tuple[SplitTensor, Any] | None" = None
    """What this is a slice of along the sequence, and its index: on one device they share memory."""

    @property
    def part(self) -> Tensor:
        """What this rank holds, as a plain tensor that shares memory and history."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Iterable[type], args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, tuple(args), dict(kwargs or {}))


def split_tensor(part: Tensor, placement: Placement) -> SplitTensor:
    """Show ``part``, this rank's, as the whole tensor of which it is placed as ``placement`` says."""
    with torch._C.DisableTorchFunctionSubclass():
        shown = part.as_subclass(SplitTensor)
        shown.placement = placement
    return shown


def split(whole: Tensor, placement: Placement) -> SplitTensor:
    """Split a tensor that every rank has whole; differentiable."""
    return split_tensor(placement.part_of(whole), placement)


def whole(x: Any) -> Any:
    """Gather a SplitTensor on every rank, differentiable; return anything else as it is."""
    return x.placement.gather(x.part) if isinstance(x, SplitTensor) else x


def part(x: Any) -> Any:
    """Return a rank's part of a SplitTensor; anything else as it is."""
    return x.part if isinstance(x, SplitTensor) else x


def shape_of(x: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return x.placement.whole_shape(x.part.shape) if isinstance(x, SplitTensor) else x.shape


# what walks over nested containers (DistributedDataParallel, fully_shard, checkpointing) sees parts
pytree.register_pytree_node(
    SplitTensor,
    lambda x: ([x.part], x.placement),
    lambda leaves, placement: split_tensor(leaf, placement) if isinstance(leaf := next(iter(leaves)), Tensor) else leaf,
    serialized_type_name="lightning_lss.SplitTensor",
)

# -- rules -------------------------------------------------------------------------------------------------------------

_rules: dict[str, Function] = {}
_composed: set[str] = set()


def rule(*names: str, composed: bool = False) -> Callable[[Function], Function]:
    """Register what functions of torch of these names do, see :func:`name_of`.

    A rule gets the function and its arguments. Within it SplitTensors are what Python says: pass their ``part`` on. It
    returns ``NotImplemented`` for arguments that it is not for. A ``composed`` rule is itself written in terms of whole
    tensors.
    """

    def register(function: Function) -> Function:
        assert _rules.keys().isdisjoint(names), f"two rules for one of {names}"
        _rules.update(dict.fromkeys(names, function))
        if composed:
            _composed.update(names)
        return function

    return register


@cache
def name_of(func: Function) -> str:
    """Name a function as rules do: ``add`` of ``torch.add``, ``Tensor.add`` and ``Tensor.__add__``; ``get shape`` of the
    property ``Tensor.shape``."""
    name: str = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return f"{name[2:5]} {func.__self__.__name__}"  # type: ignore[attr-defined]
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


@cache
def _is_of_torch(func: Function) -> bool:
    """Whether a function is torch's, or this package's, and so what its name says."""
    operator = getattr(func, "_qualified_op_name", "aten")
    module = getattr(func, "__module__", None) or "torch"
    return module.split(".")[0] in ("torch", "lightning_lss") and operator.startswith("aten")


def _dispatch(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch._C._functorch.maybe_current_level() is not None:
        raise NotImplementedError(
            f"{name_of(func)} of a sequence that is split is not known within torch.func and torch.vmap: give it to their function as an"
            " argument, not from outside."
        )
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    if kwargs.get("out", kwargs) is None:
        del kwargs["out"]
    name = name_of(func) if _is_of_torch(func) else ""
    found = _rules.get(name) or (_pointwise if is_pointwise(name) else on_whole)
    if name in _composed:
        result = _by_rule(found, func, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if name not in _composed:
            result = _by_rule(found, func, args, kwargs)
        result = on_whole(func, *args, **kwargs) if result is NotImplemented else result
    if _writes(name) and isinstance(args[0], SplitTensor) and args[0].slice_of is not None:
        base, index = args[0].slice_of
        base[index] = args[0]  # which is written to what that is a slice of, too
    return result


def _by_rule(found: Function, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return found(func, *args, **kwargs)
    except TypeError:  # arguments that the rule does not know; if they are wrong, torch says so
        if found is on_whole:
            raise
        return NotImplemented


# -- entry by entry ----------------------------------------------------------------------------------------------------

_OPERATORS = {
    **{"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "div": "div", "floordiv": "floor_divide"},
    "mod": "remainder",
    **{"pow": "pow", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
    **{"lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"},
}
_IN_PLACE = {f"i{name}" for name in _OPERATORS}
_POINTWISE = {
    *(prefix + name for name in _OPERATORS for prefix in ("", "r", "i")),
    *(
        [
            "invert",
            "pos",
            "softsign",
            "tanhshrink",
            "logsigmoid",
            "hardswish",
            "isclose",
            "complex",
            "polar",
            "real",
            "imag",
            "conj",
            "copy_",
        ]
    ),
    *("get real", "get imag"),
}  # those that torch does not tag


@cache
def is_pointwise(name: str) -> bool:
    """Whether the function of this name works entry by entry on tensors that it broadcasts against each other."""
    return name in _POINTWISE or (torch.Tag.pointwise in _tags(name.removesuffix("_")) and not _draws(name))


@cache
def _draws(name: str) -> bool:
    """Whether the function of this name draws random numbers, which it does in the order of memory."""
    return torch.Tag.nondeterministic_seeded in _tags(name) | _tags(name.removesuffix("_"))


def _tags(name: str) -> set[torch.Tag]:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    return {tag for x in packet.overloads() for tag in getattr(packet, x).tags} if packet is not None else set()


def _changes_first(name: str) -> bool:
    """Whether the function of this name changes its first argument."""
    return name in _IN_PLACE or name == "setitem" or name.startswith("set ") or name.endswith("_")


_WRITES_NOTHING = re.compile(r"(un)?squeeze_|t_|transpose_|swap\w+_|detach_|requires_grad_|rename_|share_memory_")
"""Functions that change what a tensor is, not its entries."""


@cache
def _writes(name: str) -> bool:
    """Whether the function of this name writes to the memory of its first argument."""
    return _changes_first(name) and not name.startswith("set ") and not _WRITES_NOTHING.fullmatch(name)


def align(tensors: Iterable[Any], like: SplitTensor | None = None) -> tuple[list[Any], Placement]:
    """Take what a rank needs of tensors that are broadcast against each other; also return where its result lies.

    The result is split as ``like``, else as that of the tensors whose sequence comes first. Others are gathered.
    """
    tensors = list(tensors)
    dims = max(x.dim() for x in tensors if isinstance(x, Tensor))
    split = [like] if like is not None else [x for x in tensors if isinstance(x, SplitTensor)]
    target = min((x.placement.at(x.placement.dim + dims - x.dim()) for x in split), key=lambda x: x.dim)
    return [part_like(x, target, dims) if isinstance(x, Tensor) else x for x in tensors], target


def part_like(x: Tensor, target: Placement, dims: int) -> Tensor:
    """Take a rank's part of ``x``, broadcast to ``dims`` dimensions, for a result that is placed as ``target``."""
    dim = target.dim - (dims - x.dim())
    if isinstance(x, SplitTensor) and x.placement == target.at(dim):
        return x.part
    x = whole(x)
    return target.at(dim).part_of(x) if dim >= 0 and x.size(dim) == target.size else x


def split_leaves(tree: Any, placement: Placement) -> Any:
    """Show all parts in the result of a function as whole."""
    return map_leaves(lambda x: split_tensor(x, placement) if isinstance(x, Tensor) else x, tree)


def _pointwise(func: Function, *args: Any, **kwargs: Any) -> Any:
    if "out" in kwargs or (name_of(func) == "where" and len(args) + len(kwargs) == 1):  # of one tensor: its indices
        return NotImplemented
    changed = args[0] if _changes_first(name_of(func)) else None
    if changed is not None and not isinstance(changed, SplitTensor):
        return NotImplemented
    given = [*args, *kwargs.values()]
    parts, placement = align(given, like=changed)
    result = func(*parts[: len(args)], **dict(zip(kwargs, parts[len(args) :])))
    return changed if changed is not None else split_leaves(result, placement)


# -- functions that are not known --------------------------------------------------------------------------------------


def on_whole(func: Function, *args: Any, **kwargs: Any) -> Any:
    """Give ``func`` whole tensors on every rank, and split what comes out as long as the sequence."""
    name, own = name_of(func), list(leaves((args, kwargs)))
    if "out" in kwargs:
        raise NotImplementedError(
            f"{name}(out=...) is not known for a sequence that is split: use the result of {name}."
        )
    _warn_of(name, own)
    if _changes_first(name) and not isinstance(args[0], SplitTensor) and any(True for _ in leaves(args[0])):
        raise NotImplementedError(f"{name} is not known for a list of tensors that are split: change each of them.")
    gather = _whole_as_laid_out if _draws(name) else whole
    wholes, options = map_leaves(gather, args), map_leaves(gather, kwargs)
    result = func(*wholes, **options)
    placement, dims = own[0].placement, own[0].part.dim()
    if _changes_first(name) and isinstance(args[0], SplitTensor):
        args[0].part.copy_(args[0].placement.part_of(wholes[0]))
        result = args[0] if result is wholes[0] else result
    return map_leaves(lambda x: _resplit(x, placement, dims) if type(x) is Tensor else x, result)


def _whole_as_laid_out(x: Any) -> Any:
    """Gather a SplitTensor, with its dimensions in memory as those of the parts are."""
    if not isinstance(x, SplitTensor):
        return x
    strides = x.part.stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    places = [order.index(dim) for dim in range(len(order))]
    return whole(x).permute(order).contiguous().permute(places)


def _resplit(x: Tensor, old: Placement, dims: int) -> Tensor:
    """Split a whole tensor as ``old`` where it is as long, or another dimension of that length, or, where there are as many
    dimensions ``dims`` as before, what is left of it."""
    if old.dim < x.dim() and x.size(old.dim) == old.size:
        return split(x, old)
    if old.outer * old.inner > 1:
        return x
    fits = [dim for dim in range(x.dim()) if x.size(dim) == old.length]
    if fits:
        return split(x, old.at(fits[0]))
    is_long = x.dim() == dims and 2 * x.size(old.dim) >= old.length and x.is_floating_point()
    return split(x, old._replace(length=x.size(old.dim))) if is_long else x


def _warn_of(name: str, tensors: list[SplitTensor]) -> None:
    """Tell the user, once for each line, what it costs to compute whole tensors."""
    if not any(x.part.is_floating_point() for x in tensors):
        return
    warnings.warn_explicit(  # without lengths: Python shows a text once for each line
        f"`{name}` has no rule for a sequence that is split: every rank computes it on the whole, with the memory and the time of one"
        " device. The results are exact.",
        UserWarning,
        *line_of_user(),
        registry=_warned,
    )


def line_of_user() -> tuple[str, int]:
    """The file and the line of the code that calls torch now, outside of torch and of this folder."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


_warned: dict[Any, Any] = {}  # where, as the warnings module keeps it for each module

_LIBRARIES = tuple(str(Path(path).parent) for path in (torch.__file__, __file__))


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES)


# -- nested containers -------------------------------------------------------------------------------------------------


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to all that nested tuples, lists and dicts hold."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if not isinstance(tree, (tuple, list)) or isinstance(tree, torch.Size):
        return function(tree)
    mapped = [map_leaves(function, x) for x in tree]
    return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)


def leaves(tree: Any) -> Iterable[SplitTensor]:
    """Yield all SplitTensors in nested tuples, lists and dicts."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    for child in children:
        yield from leaves(child)
    if isinstance(tree, SplitTensor):
        yield tree
