"""``torch.autograd.Function``, which does not ask tensors what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.autograd import Function

from lightning_lss.tensor.split_tensor import SplitTensor, on_whole, split_tensor

_apply = Function.apply.__func__  # type: ignore[attr-defined]


def _apply_to_whole(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Give a user's function whole tensors, whose gradients it then computes; those of torch pass parts on."""
    if not any(isinstance(x, SplitTensor) for x in args):
        return _apply(cls, *args, **kwargs)
    if not cls.__module__.startswith("torch."):
        return on_whole(lambda *a, **k: _apply(cls, *a, **k), *args, **kwargs)
    result = _apply(cls, *args, **kwargs)
    shown = {x.part.data_ptr(): x.placement for x in args if isinstance(x, SplitTensor)}

    def show(x: Any) -> Any:  # what is returned as it came is a view that does not know its placement
        return split_tensor(x, shown[x.data_ptr()]) if type(x) is Tensor and x.data_ptr() in shown else x

    return tuple(map(show, result)) if isinstance(result, tuple) else show(result)


@contextmanager
def functions_of_whole_tensors() -> Iterator[None]:
    """Within it, autograd functions are given whole tensors, as all functions without a rule are."""
    Function.apply = classmethod(_apply_to_whole)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Function.apply = classmethod(_apply)  # type: ignore[method-assign, assignment]
