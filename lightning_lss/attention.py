"""Attention along a split sequence: ``lss_attention`` and ``LSSAttention``.

Each rank computes the rows of its own queries against the keys and values of the whole sequence (LSS Transformer, arXiv
2311.02382: K and V travel together in one all-gather forward, their gradients in one reduce-scatter backward; no
partial attention is ever summed between ranks). Key/value heads are taken in chunks, so that the gather of the next
chunk is under way while a chunk is computed and a rank never holds more than two chunks of gathered keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_lss.collectives import Pending, all_gather, reduce_scatter
from lightning_lss.kernels import Kernel, select_kernel
from lightning_lss.shard import WHOLE_SEQUENCE, SequenceShard, ShardedModule
from lightning_lss.tiles import Tile, attention_tiles

# With head_chunks="auto": small chunks hide the first gather and stay in the cache, but small messages waste the
# network.
_MOST_CHUNKS = 8
_LEAST_BYTES = 2**20  # of keys and values that a rank sends at a time


def lss_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard = WHOLE_SEQUENCE,
    causal: bool = True,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    head_chunks: int | Literal["auto"] = "auto",
    keep_gathered: bool = False,
) -> Tensor:
    """Softmax attention of this rank's queries over the keys and values of the whole sequence.

    Args:
        q: [B, H, l, D], this rank's segment of the queries.
        k: [B, G, l, D], its segment of the keys; H is a multiple of G (grouped-query heads).
        v: [B, G, l, D], its segment of the values.
        shard: the rank's place in its sequence group; by default the sequence is whole and this is plain attention.
        causal: whether a query sees only keys at or before its own global position.
        scale: factor on the scores, 1 / sqrt(D) by default.
        kernel: ``"auto"`` or a name in :data:`lightning_lss.kernels.KERNELS`.
        head_chunks: in how many parts the key/value heads are gathered; a divisor of G, or ``"auto"``: up to 8 parts of
            at least 1 MiB.
        keep_gathered: keep the gathered keys and values for the backward pass instead of gathering them again. Then a
            layer has exactly two collectives, one all-gather and one reduce-scatter, as in the paper, at the price of K
            and V of the whole sequence in memory between forward and backward.

    Returns:
        [B, H, l, D] in the dtype of ``q`` (under autocast: in autocast's dtype).

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, naming the values.
    """
    q, k, v = _autocast(q, k, v)
    _check_inputs(q, k, v)
    if shard.size == 1 and kernel == "auto":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return _split_attention(q, k, v, shard, causal, scale, kernel, head_chunks, keep_gathered)


class LSSAttention(ShardedModule):
    """Attention along the split sequence, as a module without parameters.

    :class:`~lightning_lss.LSSStrategy` gives it its shard; with none it is plain attention, so a model that uses it
    runs unchanged on one device. For arguments and shapes see :func:`lss_attention`: ``forward(q, k, v)`` takes [B, H,
    l, D], [B, G, l, D], [B, G, l, D] and returns [B, H, l, D].
    """

    def __init__(
        self,
        causal: bool = True,
        *,
        scale: float | None = None,
        kernel: str = "auto",
        head_chunks: int | Literal["auto"] = "auto",
        keep_gathered: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.scale = scale
        self.kernel = kernel
        self.head_chunks = head_chunks
        self.keep_gathered = keep_gathered

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :func:`lss_attention`."""
        return lss_attention(
            q,
            k,
            v,
            self.shard,
            self.causal,
            scale=self.scale,
            kernel=self.kernel,
            head_chunks=self.head_chunks,
            keep_gathered=self.keep_gathered,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"causal={self.causal}, kernel={self.kernel!r}, head_chunks={self.head_chunks}, keep_gathered={self.keep_gathered}"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own attention does it (float64 is left alone)."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Leave the kernels the dtypes that they are given."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"Attention takes [batch, heads, length, width] tensors; got {shapes}.")
    if k.shape != v.shape or q.size(0) != k.size(0) or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"Queries, keys and values must agree in batch, length and head width, and k with v in heads; got {shapes}."
        )
    if q.size(1) % k.size(1):
        raise ValueError(
            f"The number of query heads must be a multiple of the number of key/value heads; got {shapes}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"Queries, keys and values must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")


def _resolve_chunks(k: Tensor, head_chunks: int | Literal["auto"], keep_gathered: bool) -> int:
    heads = k.size(1)
    if head_chunks == "auto":
        most = 1 if keep_gathered else min(_MOST_CHUNKS, 2 * k.nbytes // _LEAST_BYTES)
        return max(n for n in range(1, max(1, most) + 1) if heads % n == 0)
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, int) or head_chunks < 1 or heads % head_chunks:
        raise ValueError(f"head_chunks={head_chunks!r} must be 'auto' or a divisor of the {heads} key/value heads.")
    if keep_gathered and head_chunks != 1:
        raise ValueError(
            f"keep_gathered=True gathers all heads at once, so head_chunks={head_chunks} has no use: leave it at 'auto', or set"
            " keep_gathered=False to gather in chunks."
        )
    return head_chunks


@dataclass(frozen=True)
class _Plan:
    """Everything about one call that is not a tensor."""

    shard: SequenceShard
    kernel: Kernel
    causal: bool
    scale: float
    head_chunks: int
    keep_gathered: bool

    def tiles(self, local_length: int) -> tuple[Tile, ...]:
        shard = self.shard
        length = local_length * shard.size
        return attention_tiles(length, shard.rank, shard.size, shard.layout, self.causal, self.kernel.offset_diagonal)

    def chunks(self, heads: int) -> list[slice]:
        """Slices of ``heads`` heads, one a chunk; query heads of a chunk attend to its key/value heads."""
        step = heads // self.head_chunks
        return [slice(first, first + step) for first in range(0, heads, step)]


@torch.compiler.disable  # the collectives and their handles are not for the compiler: a graph break around them
def _split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    causal: bool,
    scale: float | None,
    kernel: str,
    head_chunks: int | Literal["auto"],
    keep_gathered: bool,
) -> Tensor:
    plan = _Plan(
        shard,
        select_kernel(q, kernel),
        causal,
        q.size(-1) ** -0.5 if scale is None else scale,
        _resolve_chunks(k, head_chunks, keep_gathered),
        keep_gathered,
    )
    if q.stride(-1) != 1:  # the kernels read heads as contiguous rows, and do not check
        q = q.contiguous()
    with _no_autocast(q.device.type):
        return _SplitAttention.apply(q, k, v, plan)


class _SplitAttention(torch.autograd.Function):
    """Attention of local queries over gathered keys and values, chunk of heads by chunk of heads.

    ======== =============================================== ===================================================
    forward  q [B, H, l, D], k and v [B, G, l, D]            K, V <- all-gather(k, v) [B, G, L, D]; out [B, H, l, D]
    backward grad of out [B, H, l, D]                        dq [B, H, l, D]; dk, dv <- reduce-scatter(dK, dV) [B, G, l, D]
    ======== =============================================== ===================================================
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        tiles = plan.tiles(q.size(2))
        chunks = _gathered_chunks(k, v, plan)
        outs, lses = [], []
        keys_values: Tensor | None = None
        for heads in plan.chunks(q.size(1)):
            keys_values = None  # let go of the last chunk before the next one is put in order
            keys_values = next(chunks)
            out, lse = _forward_tiles(q[:, heads], keys_values, tiles, plan)
            outs.append(out)
            lses.append(lse)
        out, lse = _cat(outs, 1), _cat(lses, 1)
        ctx.plan = plan
        ctx.save_for_backward(q, out, lse, *((keys_values,) if plan.keep_gathered else (k, v)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        plan: _Plan = ctx.plan
        q, out, lse, *keys_values = ctx.saved_tensors
        tiles = plan.tiles(q.size(2))
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        chunks = iter(keys_values) if plan.keep_gathered else _gathered_chunks(keys_values[0], keys_values[1], plan)
        grads_q: list[Tensor] = []
        scattered: list[Pending] = []
        with _no_autocast(q.device.type):
            for heads in plan.chunks(q.size(1)):
                rows = [x[:, heads] for x in (grad, q, out, lse)]
                grad_q, grad_keys_values = _backward_tiles(rows, next(chunks), tiles, plan)
                grads_q.append(grad_q)
                if scattered:
                    scattered[-1].wait()  # at most two chunks of gradients at a time
                scattered.append(_scatter(grad_keys_values, plan.shard))
        grad_k, grad_v = _cat([pending.wait() for pending in scattered], 2)
        return _cat(grads_q, 1), grad_k, grad_v, None


def _cat(tensors: list[Any], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _gathered_chunks(k: Tensor, v: Tensor, plan: _Plan) -> Iterator[Tensor]:
    """K and V of the whole sequence, [2, B, g, L, D] a chunk; while one is in use the next is being gathered."""
    if plan.shard.size == 1:
        yield from (torch.stack((k[:, heads], v[:, heads])) for heads in plan.chunks(k.size(1)))
        return
    group = plan.shard.require_group()

    def start(heads: slice) -> Pending:
        return all_gather(torch.stack((k[:, heads], v[:, heads])), group)

    chunks = plan.chunks(k.size(1))
    ahead: Pending | None = start(chunks[0])
    for following in [*chunks[1:], None]:
        assert ahead is not None
        gathered = ahead.wait()
        ahead = start(following) if following is not None else None
        in_order = plan.shard.in_position_order(gathered, dim=3)
        del gathered
        yield in_order
        del in_order


def _scatter(grad: Tensor, shard: SequenceShard) -> Pending:
    """Sum the gradients of K and V [2, B, g, L, D] over the ranks; each receives its own segment [2, B, g, l, D]."""
    if shard.size == 1:
        return Pending(grad, None)
    return reduce_scatter(shard.stacked_by_rank(grad, dim=3), shard.require_group())


def _forward_tiles(q: Tensor, keys_values: Tensor, tiles: Sequence[Tile], plan: _Plan) -> tuple[Tensor, Tensor]:
    """Rows of ``q`` [B, h, l, D] over their tiles of K and V [2, B, g, L, D]: out [B, h, l, D] and lse [B, h, l]."""
    outs, lses = [], []
    for (start, stop), row_tiles in groupby(tiles, key=lambda tile: (tile.q_start, tile.q_stop)):
        rows, out, lse = q[:, :, start:stop], None, None
        for tile in row_tiles:
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            part = plan.kernel.forward(rows, k, v, tile.causal, plan.scale)
            out, lse = part if out is None or lse is None else _join(out, lse, *part)
        outs.append(out)
        lses.append(lse)
    return _cat(outs, 2), _cat(lses, 2)


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the two results; weights are exp(lse - joint lse)."""
    joint = torch.logaddexp(lse, other_lse)
    weight = (other_lse - joint).exp_().unsqueeze(-1)
    return torch.lerp(out.to(joint.dtype), other_out.to(joint.dtype), weight).to(out.dtype), joint


def _backward_tiles(
    rows: Sequence[Tensor], keys_values: Tensor, tiles: Sequence[Tile], plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Gradients of the tiles: dq [B, h, l, D], and those of K and V as one tensor [2, B, g, L, D].

    ``rows`` are the gradient of the output, the queries, the output [B, h, l, D] and its log-sum-exp [B, h, l].
    """
    grad_keys_values = torch.zeros_like(keys_values)
    grads_q = []
    for _, row_tiles in groupby(tiles, key=lambda tile: (tile.q_start, tile.q_stop)):
        grad_q = None
        for tile in row_tiles:
            grad, q, out, lse = (x[:, :, tile.q_start : tile.q_stop] for x in rows)
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            tile_q, tile_k, tile_v = plan.kernel.backward(grad, q, k, v, out, lse, tile.causal, plan.scale)
            grad_q = tile_q if grad_q is None else grad_q.add_(tile_q)
            grad_k, grad_v = grad_keys_values[..., tile.k_start : tile.k_stop, :]
            grad_k += tile_k
            grad_v += tile_v
        grads_q.append(grad_q)
    return _cat(grads_q, 2), grad_keys_values
