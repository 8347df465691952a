"""What dispatch modes do not see by themselves: the inside of operators written in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
