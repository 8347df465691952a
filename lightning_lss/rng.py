"""Two random streams: one that a sequence group shares and one that differs by segment.

What decides about a whole sample (DropPath, augmentation) must come out equal on all ranks of a sequence group: they
draw from the default generators, whose states :func:`share_random_state` makes equal. What decides about single
elements (dropout) must differ by segment: :class:`SegmentDropout` seeds a generator of its own from the shared stream
and the rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor
from torch.nn import functional as F

from lightning_lss.shard import ShardedModule


def share_random_state(group: dist.ProcessGroup, device: torch.device) -> None:
    """Give all ranks of ``group`` the states of its first rank's generators (Python, NumPy, torch, this CUDA
    device)."""
    states = [_collect_rng_states(include_cuda=False)]
    dist.broadcast_object_list(states, group=group, group_src=0)
    _set_rng_states(states[0])
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, group=group, group_src=0)
        torch.cuda.set_rng_state(state.cpu(), device)


class SegmentDropout(ShardedModule):
    """Dropout whose mask differs from segment to segment; with one rank it is ``torch.nn.Dropout``.

    The seed of each mask is drawn from the default CPU generator, so activation checkpointing, which restores that
    generator's state, draws the same mask again.

    Args:
        p: probability of dropping an element.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p={p} must be in [0, 1): it is the probability of dropping an element.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, of any shape, and scale the others by 1 / (1 - p)."""
        if self.shard.size == 1 or not self.training or self.p == 0.0:
            return F.dropout(x, self.p, self.training)
        return x * self._mask(x)

    @torch.compiler.disable  # generators cannot be traced: a graph break, as long as there is dropout
    def _mask(self, x: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, (), device="cpu").item()) + self.shard.rank
        generator = torch.Generator(x.device).manual_seed(seed)
        return torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"p={self.p}"
