"""Run a training step and leave no trace of it: random numbers, values of tensors and attributes stay as they were."""

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from types import CellType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lss.tensor.split_tensor import part as part_of


@contextmanager
def untouched(
    module: pl.LightningModule, parameters: Iterable[Tensor], device: torch.device
) -> Generator["CopiedOnWrite", None, None]:
    """Restore everything that steps of ``module`` change: its attributes and buffers, ``parameters`` that are written to, the
    generators of random numbers, learning rates. Within, nothing is logged. Yield what sees every operator."""
    trainer = module.trainer
    states = _collect_rng_states(include_cuda=device.type == "cuda")
    with ExitStack() as stack:
        stack.callback(_set_rng_states, states)
        schedules = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        kept = stack.enter_context(_Restored(module, schedules, groups))
        written = stack.enter_context(CopiedOnWrite([*parameters, *kept.tensors]))
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        vars(module).update(log=_do_nothing, log_dict=_do_nothing)
        # a model compiled for this length would be compiled again; who does not compile need not wait for the import
        compiles = "torch._dynamo" in sys.modules
        stack.enter_context(torch.compiler.set_stance("force_eager") if compiles else nullcontext())
        yield written


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``LightningModule.log``."""


def evaluate(module: nn.Module) -> None:
    """Switch dropout off. Batch normalization goes on taking statistics, since these tell whether it sees whole
    sequences, and recurrent layers stay in training, since cuDNN has no backward for them otherwise."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.dropout = 0.0
        elif not isinstance(part, _BatchNorm):
            part.training = False


class _Restored(ExitStack):
    """Restore at exit the state that is reachable from the attributes of a module, and from ``more``: buffers and other tensors,
    containers, other modules, generators, and plain objects."""

    _LEAVES = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)
    _LARGE = 10_000  # entries; more are somebody's data

    def __init__(self, module: nn.Module, *more: Any) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        """Those that are not buffers: who writes to them must copy them first."""
        self._seen: dict[int, Any] = {}
        for buffer in module.buffers():  # copied at once: batch normalization writes to its own without saying so
            self._seen[id(buffer)] = buffer
            self.callback(buffer.detach().copy_, buffer.detach().clone())
        for root in (module, *more):
            self._keep(root)

    def _keep(self, x: Any) -> None:
        if isinstance(x, self._LEAVES) or id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if callable(x) and not isinstance(x, nn.Module):
            for part in _held_by(x):
                self._keep(part)
            return
        if isinstance(x, nn.Parameter):
            self.callback(x.requires_grad_, x.requires_grad)
        elif isinstance(x, Tensor):
            self.tensors.append(x)
        elif restore := _restorer_of_generator(x):
            self.callback(restore)
        elif type(x) in (dict, OrderedDict, defaultdict, Counter):
            self._keep_container(x, dict(x), x.values(), x.update)
        elif type(x) in (list, deque):
            self._keep_container(x, list(x), x, x.extend)
        elif type(x) is set:
            self._keep_container(x, set(x), (), x.update)
        elif isinstance(x, tuple):
            for part in x[: self._LARGE]:
                self._keep(part)
        elif isinstance(x, nn.Module) or _is_plain(x):
            self._keep(vars(x))

    def _keep_container(self, x: Any, copy: Any, parts: Iterable[Any], fill: Callable[[Any], object]) -> None:
        if len(x) > self._LARGE:
            return
        for part in list(parts):
            self._keep(part)
        self.callback(fill, copy)  # the last comes first
        self.callback(x.clear)


def _held_by(function: Any) -> list[Any]:
    """What a hook on a module holds: the object that it is a method of, and variables of the function that it was
    defined in."""
    owner = getattr(function, "__self__", None)
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]
    return [*held, vars(owner) if isinstance(owner, pl.Callback) else owner]


def _restorer_of_generator(x: Any) -> Callable[[], object] | None:
    if isinstance(x, torch.Generator):
        state = x.get_state()
        return lambda: x.set_state(state)
    if isinstance(x, np.random.Generator):
        bits = x.bit_generator.state
        return lambda: setattr(x.bit_generator, "state", bits)
    if isinstance(x, np.random.RandomState):
        words: Any = x.get_state()
        return lambda: x.set_state(words)
    if isinstance(x, random.Random):
        place = x.getstate()
        return lambda: x.setstate(place)
    return None


def _is_plain(x: Any) -> bool:
    """Whether ``x`` is an object of the user's own kind, rather than a part of the Trainer, of torch or of a run."""
    home = type(x).__module__.partition(".")[0]
    return hasattr(x, "__dict__") and home not in ("torch", "lightning", "lightning_lss", "builtins", "numpy")


class CopiedOnWrite(TorchDispatchMode):
    """Restore at exit the tensors that are written to within, such as a teacher's moving average of weights. They are
    copied when they are written to: no memory is spent on the others."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        local = (part_of(getattr(x, "_local_tensor", x)) for x in tensors)
        self._known = {x.untyped_storage()._cdata: x.untyped_storage() for x in local}
        self._saved: list[tuple[Any, Any]] = []
        self.dtypes: set[torch.dtype] = set()
        """Of the results of the operators that ran within."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Save what the operator writes to, run it, and note what it returns."""
        if getattr(getattr(func, "_schema", None), "is_mutable", False):
            for argument, x in zip(func._schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in x if isinstance(x, (list, tuple)) else [x]:
                        self._save(tensor)
        with torch._C.DisableTorchFunctionSubclass():  # operators are given what each rank holds
            result = func(*args, **(kwargs or {}))
        self.dtypes.update(
            x.dtype for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)
        )
        return result

    def _save(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter):
            storage = self._known.pop(tensor.untyped_storage()._cdata, None)
            if storage is not None:
                self._saved.append((storage, storage.clone()))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, saved in self._saved:
            storage.copy_(saved)
