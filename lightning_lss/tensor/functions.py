"""What does not ask tensors what to do: ``torch.autograd.Function``, and functions that make a tensor of another."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.properties import differentiate
from lightning_lss.tensor.split_tensor import SplitTensor, map_leaves, on_whole, part, split_tensor

_apply = Function.apply.__func__  # type: ignore[attr-defined]
_grad = torch.autograd.grad
_MAKING = ("tensor", "as_tensor", "asarray")
"""Functions of torch that take a tensor, and would take a SplitTensor for this rank's part."""


def _apply_to_whole(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Give a user's function whole tensors, whose gradients it then computes; those of torch pass parts on."""
    if not any(isinstance(x, SplitTensor) for x in args):
        return _apply(cls, *args, **kwargs)
    if not cls.__module__.startswith("torch."):
        return on_whole(lambda *a, **k: _apply(cls, *a, **k), *args, **kwargs)
    return _apply_to_parts(cls, *args, **kwargs)


def _apply_to_parts(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Apply a function that passes tensors on as they are, or to a function of the last of its arguments, as checkpointing
    does; that one sees split tensors as before."""
    placements = [x.placement if isinstance(x, SplitTensor) else None for x in args]
    shown: dict[int, Placement] = {}  # by memory: what is passed on is a view that does not know its placement

    def note(x: Any) -> Any:
        if isinstance(x, SplitTensor):
            shown[x.part.data_ptr()] = x.placement
        return part(x)

    def seeing_split(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            own = zip(given, placements[len(args) - len(given) :])
            return map_leaves(note, function(*(split_tensor(x, at) if at else x for x, at in own), **options))

        return call

    given = [seeing_split(x) if callable(x) and not isinstance(x, Tensor) else note(x) for x in args]
    result = _apply(cls, *given, **kwargs)
    return map_leaves(
        lambda x: split_tensor(x, shown[x.data_ptr()]) if type(x) is Tensor and x.data_ptr() in shown else x, result
    )


def _of_split(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function that keeps the shape of what it is given take split tensors."""

    def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        made = func(part(data), *args, **kwargs)
        return split_tensor(made, data.placement) if isinstance(data, SplitTensor) else made

    return make


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
    """Within it, autograd functions are given whole tensors, as all functions without a rule are; ``torch.tensor`` and the
    like show one of a split tensor as whole; ``torch.autograd.grad`` refuses what ranks have computed together."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Function, "apply", classmethod(_apply_to_whole)))
        stack.enter_context(patch.object(torch.autograd, "grad", _grad_on_one_rank))
        for name in _MAKING:
            stack.enter_context(patch.object(torch, name, _of_split(getattr(torch, name))))
        yield
