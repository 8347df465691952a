"""The memory of a rank at the moment of a training step at which it holds most."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lss.planner.ledger import PARTS
from lightning_lss.planner.setup import Setup
from lightning_lss.planner.walk import Walk


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part at the peak of their sum; ``moment`` names the tensor that came last before it. ``most`` has
    each part at its own peak, and ``most_work`` is the most that activations, buffers of keys and values, and logits come to
    together; these need not be the same moments."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    kv_buffers: float
    logits: float
    moment: str
    most_work: float
    most: dict[str, float]

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)


def rank_memory(setup: Setup) -> Memory:
    """Predict the memory of a rank in a step after the first, when the optimizer has its state.

    What it counts are tensors, as ``torch.distributed._tools.mem_tracker.MemTracker`` and
    ``torch.cuda.max_memory_allocated`` do: not the context of a GPU, fragmentation, the workspace inside of a kernel or
    the buffers of NCCL.
    """
    walk = Walk(setup)
    walk.step()
    return Memory(**walk.ledger.peak, moment=walk.ledger.moment, most_work=walk.ledger.most_work, most=walk.ledger.most)
