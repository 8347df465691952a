"""Compute the memory of a rank from its trace: with whole parameters, or with parts of them."""

from dataclasses import dataclass

import numpy as np

from lightning_lss.planner.trace import PARAMETERS, PARTS, STAGES, Trace

_PARAMETERS, _GRADIENTS, _OPTIMIZER = (PARTS.index(part) for part in ("parameters", "gradients", "optimizer"))
_FORWARD, _BACKWARD, _UPDATE = range(len(STAGES))


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part, at the moment of their highest sum.

    ``most`` has each part at its own highest moment. ``beside_state`` is the highest sum of activations, K/V buffers
    and logits.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    kv_buffers: float
    logits: float
    most: dict[str, float]
    beside_state: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)


def memory_of(moments: np.ndarray) -> Memory:
    """Return the peak of ``moments``, bytes [stretches, parts]."""
    highest = moments[moments.sum(1).argmax()]
    most = dict(zip(PARTS, moments.max(0).tolist()))
    return Memory(
        **dict(zip(PARTS, highest.tolist())), most=most, beside_state=float(moments[:, _OPTIMIZER + 1 :].sum(1).max())
    )


def moments_of(trace: Trace, shards: int, ddp: bool) -> np.ndarray:
    """Return the bytes at each moment of a step, [stretches, parts].

    Args:
        trace: a step with whole parameters.
        shards: number of ranks that a parameter is divided among (FSDP); 1 for whole parameters.
        ddp: whether DistributedDataParallel holds buckets as large as the gradients of shared parameters.
    """
    moments = trace.moments.copy()
    sizes = dict(zip(PARAMETERS, trace.parameters.tolist()))
    if shards == 1:
        moments[:, _GRADIENTS] += sizes["shared"] if ddp else 0.0
        return moments
    # FSDP keeps the root's parameters whole during a step, and those of two units: one in use, the next being gathered.
    # In the backward pass the gradients of the root and of two units are whole: one in use, the one before being sent.
    in_use = np.where(trace.stages == _UPDATE, 0.0, sizes["root"] + 2 * sizes["unit"])
    whole_grads = np.where(trace.stages == _BACKWARD, sizes["root"] + 2 * sizes["unit"], 0.0)
    own = sizes["own"] / max(1.0, sizes["shared"] + sizes["own"])
    kept = own + (1 - own) / shards
    moments[:, _PARAMETERS] += in_use - sizes["shared"] * (1 - 1 / shards)
    moments[:, _GRADIENTS] = moments[:, _GRADIENTS] * kept + whole_grads
    moments[:, _OPTIMIZER] *= kept
    return moments


def longest_below(cap: float, near: np.ndarray, far: np.ndarray, lengths: tuple[int, int]) -> float:
    """Return the local length at which the highest moment reaches ``cap`` bytes.

    Moments are affine in it: ``near`` and ``far`` are the same ones at the two local ``lengths``, bytes
    [stretches, parts].
    """
    start, slope = near.sum(1), (far.sum(1) - near.sum(1)) / (lengths[1] - lengths[0])
    grows = slope > 0
    if (start[~grows] > cap).any():
        return 0.0
    return float((lengths[0] + (cap - start[grows]) / slope[grows]).min(initial=np.inf))
