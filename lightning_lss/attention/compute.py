"""Attention of one rank, tile by tile, over keys and values that it has fetched.

Tiles of the same rows are joined by their log-sum-exp within the rank. No partial attention is summed between ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_lss.attention.exchange import heads_first
from lightning_lss.attention.kernels import KERNELS, Scores
from lightning_lss.attention.spec import AttentionSpec
from lightning_lss.attention.tiles import Tile


class ForwardRows(NamedTuple):
    """Rows of queries, and the results that the forward pass fills in."""

    q: Tensor  # [B, H, l, D]
    out: Tensor  # [B, H, l, D], filled in
    lse: Tensor  # log of the sum of the exponentials of each row's scores, [B, H, l], filled in


class BackwardRows(NamedTuple):
    """Rows of queries, the inputs of their backward pass, and the gradient that it fills in."""

    grad: Tensor  # gradient of the output, [B, H, l, D]
    q: Tensor  # [B, H, l, D]
    out: Tensor  # [B, H, l, D]
    lse: Tensor  # [B, H, l]
    grad_q: Tensor  # gradient of the queries, [B, H, l, D], filled in


Rows = TypeVar("Rows", ForwardRows, BackwardRows)


def cut_rows(rows: Rows, heads: slice = slice(None), span: slice = slice(None)) -> Rows:
    """View some heads of some of the rows."""
    return type(rows)(*(x[:, heads, span] for x in rows))


def empty_rows(q: Tensor) -> Tensor:
    """Allocate a tensor like ``q`` [B, H, l, D], in memory [B, l, H, D], so that the heads of a token are adjacent."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Disable autocast, so that kernels compute in the dtypes of their inputs."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def compute_tiles(rows: ForwardRows, keys_values: Tensor, tiles: Sequence[Tile], spec: AttentionSpec) -> None:
    """Fill in the output and log-sum-exp of ``rows`` over the tiles of K and V [2, B, g, L, D]."""
    kernel = KERNELS[spec.kernel_name]
    for span, row_tiles in _by_rows(tiles):
        q, out, lse = cut_rows(rows, span=span)
        joint: tuple[Tensor, Tensor] | None = None
        keys = kernel.forward_keys(span.stop - span.start)
        for tile in (part for whole in row_tiles for part in whole.cut(keys)):
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            part = kernel.forward(q, k, v, Scores(spec.scale, tile.causal))
            joint = part if joint is None else _join(*joint, *part)
        assert joint is not None
        out.copy_(joint[0])
        lse.copy_(joint[1])


def compute_tiles_backward(
    rows: BackwardRows, keys_values: Tensor, by_rank: Tensor, tiles: Sequence[Tile], spec: AttentionSpec
) -> None:
    """Fill in the gradient of the queries in ``rows``, and those of K and V in ``by_rank`` [S, l, 2, B, g, D]."""
    kernel = KERNELS[spec.kernel_name]
    chunks = [heads_first(chunk) for chunk in spec.shard.chunks_in_order(by_rank, 0)]
    sums = list(zip(*chunks))  # of K, of V: the chunks of the sequence in position order
    filled = 0  # positions that have a gradient so far; the last rows come first, since they see the most keys
    for span, row_tiles in reversed(list(_by_rows(tiles))):
        grad, q, out, lse, grad_q = cut_rows(rows, span=span)
        sum_q: Tensor | None = None
        for tile in (part for whole in row_tiles for part in whole.cut(kernel.backward_keys)):
            k, v = keys_values[..., tile.k_start : tile.k_stop, :]
            tile_q, *tile_keys_values = kernel.backward(grad, q, k, v, out, lse, Scores(spec.scale, tile.causal))
            sum_q = tile_q if sum_q is None else sum_q.to(lse.dtype).add_(tile_q)
            for sums_of_one, tile_grad in zip(sums, tile_keys_values):
                _accumulate(sums_of_one, tile_grad, tile.k_start, add=tile.k_start < filled)
            filled = max(filled, tile.k_stop)
        assert sum_q is not None
        grad_q.copy_(sum_q)
    for unseen in chunks[filled // chunks[0].size(-2) :]:
        unseen.zero_()


def _by_rows(tiles: Sequence[Tile]) -> Iterator[tuple[slice, list[Tile]]]:
    """Group the tiles by their range of local query rows."""
    for (start, stop), row_tiles in groupby(tiles, key=lambda tile: (tile.q_start, tile.q_stop)):
        yield slice(start, stop), list(row_tiles)


def _join(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the results of attention over two disjoint sets of keys, with weights exp(lse - joint lse)."""
    joint = torch.logaddexp(lse, other_lse)
    weight = (other_lse - joint).exp_().unsqueeze(-1)
    return torch.lerp(out.to(joint.dtype), other_out.to(joint.dtype), weight), joint


def _accumulate(chunks: Sequence[Tensor], grad: Tensor, start: int, add: bool) -> None:
    """Copy or add a tile's gradient [B, g, n, D] to the sequence's chunks [B, g, c, D], from position ``start`` on."""
    width, stop = chunks[0].size(-2), start + grad.size(-2)
    for index in range(start // width, -(-stop // width)):
        first = index * width
        low, high = max(start, first), min(stop, first + width)
        into, part = chunks[index][..., low - first : high - first, :], grad[..., low - start : high - start, :]
        into.add_(part) if add else into.copy_(part)
