"""See every operator that torch runs, the inside of operators written in Python included."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def is_own_operator(func: Any) -> bool:
    """Whether it is an operator that lightning_lss has registered, such as attention under selective checkpointing."""
    return func.namespace == "lightning_lss"


def run_inside(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run the operator's Python code with ``mode`` active, so that its tensors and collectives are seen as well."""
    device = next(x.device.type for x in tree_leaves(args) if isinstance(x, Tensor))
    keys = torch._C.DispatchKeySet(torch._C._parse_dispatch_key(device.upper()))  # type: ignore[arg-type]
    with mode:
        return func.redispatch(keys, *args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Calls ``see(func, args, result)`` after every operator ``func`` that is run within; distributed tensors are seen
    as their local tensors."""

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
