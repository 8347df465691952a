"""Record one rank's training step, and extrapolate it to other lengths and numbers of ranks.

At a fixed number of ranks S everything that a step holds, sends and computes (but attention's operations) is affine in
the local length l; at a fixed l it is affine in S. So two steps that run the same operators give all others.
"""

from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("parameters", "gradients", "optimizer", "activations", "kv_buffers", "logits")
"""Parts of a rank's memory. Activations are everything else: tensors kept for backward, and temporaries."""

STAGES = ("forward", "backward", "optimizer")

WORK = ("matmul", "attention", "written", "kernels")
"""Operations of matrix multiplications and of attention, bytes that kernels write, and number of kernels."""

KINDS = ("all_gather", "all_reduce", "all_to_all", "broadcast", "receive", "reduce_scatter")

COLLECTIVES = ("calls", "payload", "matmul", "attention", "written", "stage")
"""Figures of a collective: calls, bytes of their payload, work between its start and the first use of its result, and
index of its stage."""

PARAMETERS = ("shared", "own", "root", "unit", "units")
"""Bytes of the parameters that all ranks share, of the segment-local ones, of the shared ones outside every unit of
FSDP, of the largest unit; and the number of units."""


@dataclass(frozen=True)
class Trace:
    """One training step of one rank."""

    moments: np.ndarray
    """[stretches, parts], bytes: the highest moment of each stretch of the step."""
    stages: np.ndarray
    """[stretches], index of the stage of each stretch."""
    work: np.ndarray
    """[stages, work]."""
    collectives: np.ndarray
    """[number, len(COLLECTIVES)], in the order of the step; those of a few bytes are left out."""
    kinds: np.ndarray
    """[number], names of their kinds."""
    parameters: np.ndarray
    """[len(PARAMETERS)]."""

    def toward(self, other: "Trace", share: float) -> "Trace":
        """Return the trace at ``share`` of the way from this one to ``other``; a share above 1 extrapolates."""
        here, there = self.aligned(other)
        pairs = [(getattr(here, field.name), getattr(there, field.name)) for field in fields(Trace)]
        return Trace(*(a if a.dtype.kind == "U" else a + (b - a) * share for a, b in pairs))

    def aligned(self, other: "Trace") -> tuple["Trace", "Trace"]:
        """Return both with the same stretches and collectives in each row; condensed, where the steps do not match."""
        return (self, other) if self.matches(other) else (self.condensed(), other.condensed())

    def matches(self, other: "Trace") -> bool:
        """Tell whether both steps have the same stretches and collectives."""
        return np.array_equal(self.stages, other.stages) and np.array_equal(self.kinds, other.kinds)

    def condensed(self) -> "Trace":
        """Keep only the highest moment of each stage, and the sum of the collectives of each kind and stage."""
        stages = np.arange(len(STAGES))
        moments = np.stack([self._highest(stage) for stage in stages])
        rows = []
        for stage, kind in product(stages, KINDS):
            chosen = self.collectives[(self.kinds == kind) & (self.collectives[:, -1] == stage)]
            rows.append([*chosen[:, :-1].sum(0), stage])
        kinds = np.array(KINDS * len(STAGES))
        return Trace(moments, stages, self.work, np.array(rows), kinds, self.parameters)

    def _highest(self, stage: Any) -> np.ndarray:
        moments = self.moments[self.stages == stage]
        return moments[moments.sum(1).argmax()] if len(moments) else np.zeros(len(PARTS))

    def save(self, path: Path) -> None:
        """Write the trace to ``path``."""
        np.savez_compressed(path, **dict(zip((field.name for field in fields(Trace)), astuple(self))))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a file that :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**{field.name: file[field.name] for field in fields(cls)})
