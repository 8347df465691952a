"""Derive the traces of all numbers of ranks and lengths from a few, and keep these on disk."""

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_lss.planner.fingerprint import code_version, fingerprint
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
        self._key = repr((fingerprint(self.module), code_version(), shapes, self.options, self.kernel, name))
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
            self._taken[key] = self._load_or_take(*key)
        return self._taken[key]

    def _load_or_take(self, size: int, length: int, batch_size: int) -> Trace:
        path = None
        if self.folder is not None:
            name = hashlib.sha256(f"{self._key} {size} {length} {batch_size}".encode()).hexdigest()[:32]
            path = self.folder / f"{name}.npz"
            if path.is_file():
                return Trace.load(path)
        self.on_trace(f"{self.scheme.name if self.scheme else 'lss'}, S = {size}, L = {length:,}")
        rank = Rank(size, length, batch_size, self.options, self.kernel, self.scheme)
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
