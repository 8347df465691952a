"""``torch.autograd.Function`` and ``torch.autograd.grad``, which do not ask tensors what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from lightning_lss.tensor.properties import differentiate
from lightning_lss.tensor.split_tensor import SplitTensor, on_whole, split_tensor

_apply = Function.apply.__func__  # type: ignore[attr-defined]
_grad = torch.autograd.grad


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


def _grad_on_one_rank(outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse gradients of what ranks have summed or gathered, such as a loss: each has only its part of them."""
    if any(_crosses_ranks(x) for x in tree_leaves(outputs) if isinstance(x, Tensor)):
        differentiate(_grad)
    return _grad(outputs, *args, **kwargs)


def _crosses_ranks(x: Tensor) -> bool:
    """Whether ``x`` was computed from tensors of several ranks."""
    nodes, seen = [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if getattr(type(node), "_forward_cls", Function).__module__.startswith("lightning_lss.sequence."):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


@contextmanager
def functions_of_whole_tensors() -> Iterator[None]:
    """Within it, autograd functions are given whole tensors, as all functions without a rule are; ``torch.autograd.grad``
    refuses what ranks have computed together."""
    Function.apply = classmethod(_apply_to_whole)  # type: ignore[method-assign, assignment]
    torch.autograd.grad = _grad_on_one_rank
    try:
        yield
    finally:
        Function.apply = classmethod(_apply)  # type: ignore[method-assign, assignment]
        torch.autograd.grad = _grad
