"""Stand-ins for attention kernels on tensors without contents: each allocates what the real one allocates."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from lightning_lss.attention.kernels import KERNELS, Kernel
from lightning_lss.planner.tracker import Tracker

_TRACED = "cpu_flash"  # steps are traced on CPU tensors, and attention chooses this kernel there


@contextmanager
def stand_in(name: str, length: int, tracker: Tracker) -> Iterator[None]:
    """Let attention on CPU tensors allocate what the kernel ``name`` would, and count its operations in ``tracker``.

    A kernel that takes a few keys at a time is called twice a tile instead, whatever the tile's length. More calls
    would not hold more: the result of one call and the sum of the calls before. They would take thousands of operators.
    ``length`` is the global sequence length L.
    """
    kernel = _stand_in(KERNELS[name], length, tracker)
    with patch.dict(KERNELS, {name: kernel, _TRACED: kernel}):
        yield


def _stand_in(kernel: Kernel, length: int, tracker: Tracker) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        tracker.add_attention(q, k, v, causal, backward=False)
        tracker.relabel(k, "kv_buffers")
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_empty(*q.shape[:3], v.size(-1)), lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tracker.add_attention(q, k, v, causal, backward=True)
        return q.new_empty(q.shape), _empty_keys(k, kernel.backward_keys), _empty_keys(v, kernel.backward_keys)

    def fewer(limit: int | None) -> int | None:
        return None if limit is None else max(limit, -(-length // 2))

    def forward_keys(rows: int) -> int | None:
        return fewer(kernel.forward_keys(rows))

    return kernel._replace(
        forward=forward, backward=backward, backward_keys=fewer(kernel.backward_keys), forward_keys=forward_keys
    )


def _empty_keys(k: Tensor, most: int | None) -> Tensor:
    """Return a tensor like ``k`` [B, G, n, D] that occupies the memory of at most ``most`` keys."""
    batch, heads, keys, width = k.shape
    if most is None or keys <= most:
        return k.new_empty(k.shape)
    return k.new_empty(batch, heads, most, width).as_strided(k.shape, (heads * most * width, most * width, 0, 1))
