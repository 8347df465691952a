"""Rules of functions along dimensions: a part has all it takes unless the sequence is among them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_lss.sequence.borders import sum_over_ranks
from lightning_lss.tensor.split_tensor import (
    Function,
    SplitTensor,
    align,
    name_of,
    rule,
    shape_of,
    split_leaves,
    split_tensor,
)


def _dims(given: Any, dims: int) -> list[int]:
    """Dimensions from one or several; None and () are all."""
    asked = range(dims) if given is None else [given] if isinstance(given, int) else list(given) or range(dims)
    return sorted({d % dims for d in asked})


# -- functions that keep their dimensions ------------------------------------------------------------------------------

_DEFAULTS = {"sort": -1, "argsort": -1, "topk": -1, "glu": -1, "normalize": 1}  # of dim
_PLACES = {"topk": 1, "normalize": 1, "renorm": 1, "roll": 1, "logit": 9}  # of dim among the arguments


@rule(
    *[
        "softmax",
        "log_softmax",
        "softmin",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "logcumsumexp",
        "sort",
        "argsort",
        "topk",
        "glu",
        "normalize",
    ]
)
@rule(*["flip", "roll", "renorm", "diff"])
def along(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """Along dimensions other than the sequence."""
    name = name_of(func)
    place = _PLACES.get(name, 0)
    given = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("dims", _DEFAULTS.get(name)))
    if name == "flip":
        given = args if args and isinstance(args[0], int) else given
    if (
        name == "diff"
        or given is None
        or not isinstance(x, SplitTensor)
        or x.placement.dim in _dims(given, x.part.dim())
    ):
        return NotImplemented
    return split_leaves(func(x.part, *args, **kwargs), x.placement)


@rule("layer_norm", "rms_norm")
def normalize_last(func: Function, x: SplitTensor, shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Over the last dimensions."""
    if not isinstance(x, SplitTensor) or x.placement.dim >= x.part.dim() - len(shape):
        return NotImplemented
    return split_tensor(func(x.part, shape, *args, **kwargs), x.placement)


# -- functions that remove dimensions ----------------------------------------------------------------------------------


@rule(
    *[
        "sum",
        "mean",
        "nansum",
        "nanmean",
        "amax",
        "amin",
        "logsumexp",
        "std",
        "var",
        "norm",
        "any",
        "all",
        "prod",
        "argmax",
        "argmin",
        "max",
        "min",
    ]
)
@rule(*["median", "mode", "count_nonzero", "aminmax", "std_mean", "var_mean"])
def reduce(func: Function, x: SplitTensor, *args: Any, **kwargs: Any) -> Any:
    """Over dimensions. Over the sequence, sums and means add up what each rank has."""
    name = name_of(func)
    if name in ("max", "min") and args and isinstance(args[0], Tensor):  # of two tensors
        parts, placement = align([x, args[0]])
        return split_tensor(func(*parts), placement)
    if not isinstance(x, SplitTensor) or "out" in kwargs or any(isinstance(a, Tensor) for a in args):
        return NotImplemented
    options = dict(zip(("p", "dim", "keepdim") if name == "norm" else ("dim", "keepdim"), args)) | kwargs
    given = options.pop("axis", options.get("dim"))
    options["dim"] = given
    dims, keepdim = _dims(given, x.part.dim()), bool(options.get("keepdim"))
    if x.placement.dim in dims:
        return _over_sequence(name, x, dims, keepdim, options.get("dtype"))
    placement = x.placement.at(x.placement.dim - (0 if keepdim else sum(d < x.placement.dim for d in dims)))
    return split_leaves(func(x.part, **options), placement)


def _over_sequence(name: str, x: SplitTensor, dims: list[int], keepdim: bool, dtype: torch.dtype | None) -> Any:
    placement = x.placement
    if name in ("any", "all"):
        wanted = placement.counting(x.part != 0 if name == "any" else x.part == 0, False)
        found = sum_over_ranks(wanted.sum(dims, keepdim), placement.shard) > 0
        return found if name == "any" else ~found
    if name not in ("sum", "mean"):
        return NotImplemented
    total = sum_over_ranks(placement.counting(x.part).sum(dims, keepdim, dtype=dtype), placement.shard)
    return total if name == "sum" else total / prod(shape_of(x)[d] for d in dims)
