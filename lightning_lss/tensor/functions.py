"""What does not ask tensors what to do: autograd functions, ``torch.autograd.grad``, transforms of functions, scripted functions,
and functions that make a tensor of another."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._functorch import apis, eager_transforms
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction

from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.properties import differentiate
from lightning_lss.tensor.split_tensor import SplitTensor, leaves, map_leaves, on_whole, part, split_tensor

_apply = Function.apply.__func__  # type: ignore[attr-defined]
_grad = torch.autograd.grad
_MAKING = ("tensor", "as_tensor", "asarray")
"""Functions of torch that take a tensor, and would take a SplitTensor for this rank's part."""
_TRANSFORMS = ((apis, "vmap_impl"), (eager_transforms, "grad_impl"), (eager_transforms, "grad_and_value_impl"))
"""What ``torch.vmap``, ``torch.func.grad`` and ``torch.func.grad_and_value`` call, however a user has imported them."""
_SCRIPTED = (torch._C.ScriptFunction, torch._C.ScriptMethod)
"""What ``torch.jit.script`` and ``torch.jit.trace`` make of functions and of modules."""


def _apply_to_whole(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Give a user's function whole tensors, whose gradients it then computes; those of torch pass parts on."""
    if not any(isinstance(x, SplitTensor) for x in args):
        return _apply(cls, *args, **kwargs)
    if cls is BackwardHookFunction:
        raise NotImplementedError(
            "Backward hooks of modules are not known for a sequence that is split. Hook the tensor instead: output.register_hook(...)."
        )
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


def _on_whole(func: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function that does not ask tensors take whole ones."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return on_whole(func, *args, **kwargs) if any(True for _ in leaves((args, kwargs))) else func(*args, **kwargs)

    return call


def _scripted(cls: type) -> Callable[..., Any]:
    call = cls.__call__

    def torch_jit(*args: Any, **kwargs: Any) -> Any:  # the name that a warning says
        return call(*args, **kwargs)

    return _on_whole(torch_jit)


def _grad_on_one_rank(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse gradients through what ranks have summed or gathered, such as a loss: each has only its part of them."""
    if _crosses_ranks(outputs, inputs):
        differentiate(_grad)
    return _grad(outputs, inputs, *args, **kwargs)


def _crosses_ranks(outputs: Any, inputs: Any) -> bool:
    """Whether what ``outputs`` were computed from, back to ``inputs``, was communicated."""
    outputs, inputs = ([x] if isinstance(x, Tensor) else [*x] for x in (outputs, inputs))
    seen = {x.grad_fn for x in inputs} | {None}
    found = [x.grad_fn for x in outputs]
    while found:
        node = found.pop()
        if node in seen:
            continue
        if getattr(getattr(node, "_forward_cls", None), "__module__", "").startswith("lightning_lss.sequence."):
            return True
        seen.add(node)
        found += [before for before, _ in node.next_functions]
    return False


@contextmanager
def functions_of_whole_tensors() -> Iterator[None]:
    """Within it, autograd functions, transforms and scripts are given whole tensors, as all functions without a rule are;
    ``torch.tensor`` and the like show one of a split tensor as whole; and ``torch.autograd.grad`` is refused across ranks."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Function, "apply", classmethod(_apply_to_whole)))
        stack.enter_context(patch.object(torch.autograd, "grad", _grad_on_one_rank))
        for name in _MAKING:
            stack.enter_context(patch.object(torch, name, _of_split(getattr(torch, name))))
        for scripted in _SCRIPTED:
            stack.enter_context(patch.object(scripted, "__call__", _scripted(scripted)))
        for module, name in _TRANSFORMS:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, _on_whole(getattr(module, name))))
        yield
