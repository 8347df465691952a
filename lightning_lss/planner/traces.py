"""Derive the traces of all numbers of ranks and lengths from a few, and keep these on disk."""

import hashlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_lss.nn.positions import DeferredTable
from lightning_lss.planner.step import Options, Rank, Scheme, trace_step
from lightning_lss.planner.trace import Trace
from lightning_lss.sequence.batch import tensors_by_path

_TOLERANCE = 0.02  # relative error of the peak of an extrapolated trace


@dataclass
class Traces:
    """Steps of ranks that train one module under one scheme.

    LSS is traced for up to 4 ranks and extrapolated to more, since at a fixed local length all is affine in S. Other
    schemes are traced for every S.
    """

    module: pl.LightningModule
    batch: Any  # an example of what the module's training_step receives
    options: Options
    kernel: str  # name of the attention kernel on the planned hardware
    scheme: Scheme | None = None  # None: LSS
    folder: Path | None = None  # to keep traces in; None keeps none
    on_trace: Callable[[str], None] = lambda description: None  # called before each new trace

    def __post_init__(self) -> None:
        shapes = [(path, tuple(x.shape), str(x.dtype)) for path, x in tensors_by_path(self.batch)]
        name = self.scheme and self.scheme.name
        self._key = repr((fingerprint(self.module), _code_version(), shapes, self.options, self.kernel, name))
        self._taken: dict[tuple[int, int, int], Trace] = {}

    def at(self, size: int, length: int, batch_size: int) -> Trace:
        """Return the step of one of ``size`` ranks that share ``batch_size`` sequences of ``length``."""
        if size <= 4 or self.scheme is not None:
            return self.taken(size, length, batch_size)
        two, four = (self.taken(n, length // size * n, batch_size) for n in (2, 4))
        return two.toward(four, (size - 2) / 2)

    def check(self, size: int, length: int, batch_size: int) -> None:
        """Compare an extrapolated trace with a real one, and warn where their peaks differ."""
        predicted = self.at(size, length, batch_size).moments.sum(1).max()
        taken = self.taken(size, length, batch_size).moments.sum(1).max()
        if abs(predicted / taken - 1) > _TOLERANCE:
            warnings.warn(
                f"The memory of this module is not affine in the number of ranks: {predicted:.4g} bytes were extrapolated for S={size},"
                f" L={length}, but a trace has {taken:.4g}. The plan for more than 4 ranks may be as far off.",
                stacklevel=2,
            )

    def taken(self, size: int, length: int, batch_size: int) -> Trace:
        """Return a trace of exactly this step: from memory, from disk, or a new one."""
        key = (size, length, batch_size)
        if key not in self._taken:
            self._taken[key] = self._load_or_take(Rank(*key, self.options, self.kernel, self.scheme))
        return self._taken[key]

    def _load_or_take(self, rank: Rank) -> Trace:
        key = f"{self._key} {rank.size} {rank.length} {rank.batch_size}"
        path = self.folder and self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        if path is not None and path.is_file():
            return Trace.load(path)
        self.on_trace(f"{self.scheme.name if self.scheme else 'lss'}, S = {rank.size}, L = {rank.length:,}")
        trace = trace_step(self.module, self.batch, rank)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.npz")
            trace.save(unfinished)
            unfinished.replace(path)
        return trace


def cache_folder() -> Path:
    """Return the folder of traces: ``lightning_lss/traces`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_lss" / "traces"


# -- which steps are the same ------------------------------------------------------------------------------------------

_PLAIN = (bool, int, float, str, tuple, list, torch.dtype, type(None))


def fingerprint(module: nn.Module) -> str:
    """Hash the classes, settings and shapes of a module and all below it, and the source of its classes."""
    names = {type(part).__module__ for part in module.modules()}
    sources = [_source_of(name) for name in sorted(names) if not name.startswith(("torch", "lightning."))]
    return hashlib.sha256(repr([*_facts(module), *sources]).encode()).hexdigest()


def _facts(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, part in module.named_modules():
        settings = sorted((key, repr(x)) for key, x in vars(part).items() if isinstance(x, _PLAIN) and key != "seed")
        yield name, type(part).__module__, type(part).__qualname__, settings
    for name, x in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        shape = x.rows.shape if isinstance(x, DeferredTable) else tuple(x.shape)
        yield name, shape, str(x.dtype), x.requires_grad


def _source_of(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):  # the class was typed into an interpreter
        return name


@cache
def _code_version() -> str:
    """Hash the versions of torch and Lightning, and the package's own code."""
    digest = hashlib.sha256(f"{torch.__version__} {pl.__version__}".encode())
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
