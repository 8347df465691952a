"""Attention of one rank, tile by tile, over keys and values that it has fetched.

Tiles of the same rows are joined by their log-sum-exp within the rank. No partial attention is summed between ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_lss.attention.kernels import Packed, Segments
from lightning_lss.attention.plan import Plan
from lightning_lss.attention.scores import ScoreMaker
from lightning_lss.attention.series import Series
from lightning_lss.attention.tiles import RowGroup, Tile


class ForwardRows(NamedTuple):
    """Rows of queries, and the results that the forward pass fills in."""

    q: Tensor  # [B, H, l, D]
    out: Tensor  # [B, H, l, Dv], filled in
    lse: Tensor  # log of the sum of the exponentials of each row's scores, [B, H, l], filled in


class BackwardRows(NamedTuple):
    """Rows of queries, the inputs of their backward pass, and the gradient that it fills in."""

    grad: Tensor  # gradient of the output, [B, H, l, Dv]
    q: Tensor  # [B, H, l, D]
    out: Tensor  # [B, H, l, Dv]
    lse: Tensor  # [B, H, l]
    grad_q: Tensor  # gradient of the queries, [B, H, l, D], filled in


Rows = TypeVar("Rows", ForwardRows, BackwardRows)


def rows_of_heads(rows: Rows, heads: slice) -> Rows:
    """View some heads."""
    return type(rows)(*(x[:, heads] for x in rows))


def _rows_of(rows: Rows, batch: slice, span: slice) -> Rows:
    return type(rows)(*(x[batch, :, span] for x in rows))


def _rows_of_group(rows: Rows, group: RowGroup) -> Rows:
    return _rows_of(rows, group.batch, slice(group.q_start, group.q_stop))


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Disable autocast, so that kernels compute in the dtypes of their inputs."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


# -- forward -----------------------------------------------------------------------------------------------------------


def compute_rows(
    rows: ForwardRows, k: Tensor, v: Tensor, plan: Plan, maker: ScoreMaker, sinks: Tensor | None = None
) -> None:
    """Fill in the output and log-sum-exp of ``rows`` over fetched keys [B, g, n, D] and values [B, g, n, Dv].

    ``sinks`` [H] are further scores of each row, of values that are zero. A row that sees nothing gets 0 for both.
    """
    if plan.hides_rows:
        rows.out.zero_()
        rows.lse.fill_(float("-inf"))
    for series in plan.series:
        packed = maker.packed(series)
        if packed is not None:
            _compute_series(rows, k, v, series, packed, maker)
            continue
        for group in series.groups:
            _compute_group(rows, k, v, group, maker)
    if sinks is not None:
        _add_sinks(rows, sinks)
    rows.lse.masked_fill_(rows.lse.isneginf(), 0.0)


def _compute_series(rows: ForwardRows, k: Tensor, v: Tensor, series: Series, packed: Packed, maker: ScoreMaker) -> None:
    q, out, lse = _rows_of(rows, series.batch, series.rows)
    own_k, own_v = (x[series.batch, :, series.keys] for x in (k, v))
    segments = Segments(series.row_bounds, series.key_bounds)
    computed = packed.forward(q, own_k, own_v, segments, maker.scores_of_series(series))
    for into, result in zip((out, lse), computed):
        into.copy_(result)


def _compute_group(rows: ForwardRows, k: Tensor, v: Tensor, group: RowGroup, maker: ScoreMaker) -> None:
    q, out, lse = _rows_of_group(rows, group)
    joint = _Joint(q.size(2))
    for tile in group.tiles:
        kernel = maker.kernel(tile)
        for part in maker.parts(tile, forward=True):
            span, keys = _place(part, group)
            computed = kernel.forward(
                q[:, :, span], k[group.batch, :, keys], v[group.batch, :, keys], maker.scores(group.batch, part)
            )
            joint.add(span, *computed)
    for into, result in zip((out, lse), joint.results):
        into.copy_(result)


def _place(tile: Tile, group: RowGroup) -> tuple[slice, slice]:
    """The rows of a tile within its group, and its keys."""
    return slice(tile.q_start - group.q_start, tile.q_stop - group.q_start), slice(tile.k_start, tile.k_stop)


class _Joint:
    """Attention of some rows over the keys of the tiles so far."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    @property
    def results(self) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp."""
        assert self._out is not None
        assert self._lse is not None
        return self._out, self._lse

    def add(self, span: slice, out: Tensor, lse: Tensor) -> None:
        """Join the results of a tile, for the rows ``span``, with weights exp(lse - joint lse)."""
        if self._out is None and out.size(-2) == self._rows:
            self._out, self._lse = out, lse
            return
        if self._out is None:
            self._out = lse.new_zeros(*lse.shape[:-1], self._rows, out.size(-1))
            self._lse = lse.new_full((*lse.shape[:-1], self._rows), float("-inf"))
        self._out = self._out.to(lse.dtype)
        own = self.results[1][..., span]
        torch.logaddexp(own, lse, out=own)
        weight = (lse - own).exp_().masked_fill_(own.isneginf(), 0.0)
        self._out[..., span, :].lerp_(out.to(lse.dtype), weight.unsqueeze(-1))


def _add_sinks(rows: ForwardRows, sinks: Tensor) -> None:
    """Join tiles whose values are zero."""
    scores = sinks.to(rows.lse.dtype)[:, None]
    joint = torch.logaddexp(rows.lse, scores)
    rows.out.mul_((rows.lse - joint).exp_().masked_fill_(joint.isneginf(), 0.0).unsqueeze(-1))
    rows.lse.copy_(joint)


# -- backward ----------------------------------------------------------------------------------------------------------


def compute_rows_backward(
    rows: BackwardRows, k: Tensor, v: Tensor, sums: "KeySums", plan: Plan, maker: ScoreMaker
) -> None:
    """Fill in the gradient of the queries in ``rows``, and those of the fetched keys and values in ``sums``."""
    if plan.hides_rows:
        rows.grad_q.zero_()
    for series in reversed(plan.series):  # the last rows come first, since they see the most keys
        packed = maker.packed(series)
        if packed is not None:
            _series_backward(rows, k, v, sums, series, packed, maker)
            continue
        for group in reversed(series.groups):
            _group_backward(rows, k, v, sums, group, maker)
    sums.finish()


def _series_backward(
    rows: BackwardRows, k: Tensor, v: Tensor, sums: "KeySums", series: Series, packed: Packed, maker: ScoreMaker
) -> None:
    grad, q, out, lse, grad_q = _rows_of(rows, series.batch, series.rows)
    own_k, own_v = (x[series.batch, :, series.keys] for x in (k, v))
    segments = Segments(series.row_bounds, series.key_bounds)
    sum_q, sum_k, sum_v = packed.backward(grad, q, own_k, own_v, out, lse, segments, maker.scores_of_series(series))
    sums.add(series.batch, series.keys.start, sum_k, sum_v)
    grad_q.copy_(sum_q)


def _group_backward(
    rows: BackwardRows, k: Tensor, v: Tensor, sums: "KeySums", group: RowGroup, maker: ScoreMaker
) -> None:
    grad, q, out, lse, grad_q = _rows_of_group(rows, group)
    sum_q: Tensor | None = None
    for tile in group.tiles:
        kernel = maker.kernel(tile)
        for part in maker.parts(tile, forward=False):
            span, keys = _place(part, group)
            tile_q, tile_k, tile_v = kernel.backward(
                grad[:, :, span],
                q[:, :, span],
                k[group.batch, :, keys],
                v[group.batch, :, keys],
                out[:, :, span],
                lse[:, :, span],
                maker.scores(group.batch, part),
            )
            sums.add(group.batch, part.k_start, tile_k, tile_v)
            if sum_q is None and part.rows == q.size(2):
                sum_q = tile_q
                continue
            sum_q = lse.new_zeros(q.shape) if sum_q is None else sum_q.to(lse.dtype)
            sum_q[:, :, span].add_(tile_q)
    assert sum_q is not None
    grad_q.copy_(sum_q)


class KeySums:
    """Sums the gradients of keys and values over tiles, in the memory that is sent.

    The first gradient of a key is copied, others are added, so that nothing is zeroed first.

    Args:
        chunks: views of the memory in the order of the fetched keys, [B, g, c, D + Dv] each.
        width: width D of the keys.
    """

    def __init__(self, chunks: Sequence[Tensor], width: int) -> None:
        self._chunks, self._width = chunks, width
        self._batch, self._size = chunks[0].size(0), chunks[0].size(-2)
        self._filled: dict[tuple[int, int], NDArray[np.bool_]] = {}

    def add(self, batch: slice, start: int, grad_k: Tensor, grad_v: Tensor) -> None:
        """Add the gradients of a tile, whose first key is ``start``, for some rows of the batch."""
        filled = self._filled.setdefault((batch.start, batch.stop), np.zeros(len(self._chunks) * self._size, np.bool_))
        stop = start + grad_k.size(-2)
        for low, high, again in _runs(filled, start, stop):
            for whole, first, last in self._spans(low, high):
                for columns, grad in ((slice(self._width), grad_k), (slice(self._width, None), grad_v)):
                    into = whole[batch, ..., first:last, columns]
                    shift = low - start
                    part = grad[..., shift : shift + last - first, :]
                    into.add_(part) if again else into.copy_(part)
                low += last - first
        filled[start:stop] = True

    def finish(self) -> None:
        """Fill in zeros where no tile has looked."""
        seen = np.zeros(self._batch, np.bool_)
        for (first, last), filled in self._filled.items():
            seen[first:last] = True
            for low, high, _ in (run for run in _runs(filled, 0, len(filled)) if not run[2]):
                for whole, start, stop in self._spans(low, high):
                    whole[first:last, ..., start:stop, :] = 0
        for row in np.flatnonzero(~seen):
            for whole in self._chunks:
                whole[row] = 0

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        """The chunks that hold some keys, and where."""
        for index in range(start // self._size, -(-stop // self._size)):
            first = index * self._size
            yield self._chunks[index], max(start - first, 0), min(stop - first, self._size)


def _runs(flags: NDArray[np.bool_], start: int, stop: int) -> list[tuple[int, int, bool]]:
    """The runs of equal flags in [start, stop), each with its value."""
    edges = [start, *(start + 1 + np.flatnonzero(np.diff(flags[start:stop]))).tolist(), stop]
    return [(low, high, bool(flags[low])) for low, high in pairwise(edges)]
