"""What crosses the border of a segment equals what torch makes of the whole sequence, with its gradients."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss.sequence import borders
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.testing.compare import assert_equal

LAYOUTS = ["contiguous", "zigzag", "balanced"]
On, Of = Callable[[Tensor, SequenceShard], Tensor], Callable[[Tensor], Tensor]


def shard_of(rank: int, layout: str, per_rank: int = 3, padding: int = 0) -> SequenceShard:
    """A place in the world; a balanced layout has ``per_rank`` chunks on each rank, in a random order."""
    size, assignment = dist.get_world_size(), None
    if layout == "balanced":
        chunks = random.Random(size).sample(range(size * per_rank), size * per_rank)
        assignment = ChunkAssignment(tuple(tuple(sorted(chunks[r::size])) for r in range(size)))
    return SequenceShard(rank, size, layout, dist.group.WORLD, assignment=assignment, padding=padding)


def weights_like(x: Tensor, rank: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(50 + rank), dtype=torch.float64)


def own_part(shard: SequenceShard, x: Tensor, dim: int, padding: float = 0.0) -> Tensor:
    """This rank's part of ``x`` [..., L, ...], in a loop over positions."""
    local = (x.size(dim) + shard.padding) // shard.size
    filling = torch.full_like(x.select(dim, 0), padding)
    return torch.stack([x.select(dim, p) if p < x.size(dim) else filling for p in shard.places(local).tolist()], dim)


def compare(shard: SequenceShard, x: Tensor, dim: int, on_segment: On, on_whole: Of, is_segment: bool) -> None:
    """Compare a function of a segment with that of the whole, and its gradients under other losses on every rank.

    Padding is NaN, so that it is seen wherever it gets.
    """
    segment = own_part(shard, x, dim, float("nan")).requires_grad_()
    result = on_segment(segment, shard)
    if is_segment and shard.padding:
        valid = shard.valid(segment.size(dim)).view([-1 if d == dim else 1 for d in range(x.dim())])
        result = result.where(valid, 0)
    (result * weights_like(result, shard.rank)).sum().backward()

    whole = x.clone().requires_grad_()
    expected = on_whole(whole)
    parts = [own_part(replace(shard, rank=r), expected, dim) if is_segment else expected for r in range(shard.size)]
    sum((part * weights_like(part, r)).sum() for r, part in enumerate(parts)).backward()
    assert segment.grad is not None
    assert whole.grad is not None
    assert_equal([result, segment.grad], [parts[shard.rank], own_part(shard, whole.grad, dim)], 1e-10)


def shifted(x: Tensor, offset: int, dim: int, fill: float) -> Tensor:
    """The same in torch, for one device."""
    length = x.size(dim)
    offset = max(-length, min(length, offset))
    kept = x.narrow(dim, max(0, offset), length - abs(offset))
    end = torch.full_like(x.narrow(dim, 0, abs(offset)), fill)
    return torch.cat([kept, end] if offset > 0 else [end, kept], dim)


def valid_rows(rows: int, length: int, left: bool) -> Tensor:
    """Rows that are padded, the last of them entirely."""
    counts = torch.randint(1, length + 1, (rows, 1), generator=torch.Generator().manual_seed(rows))
    counts[-1] = 0
    valid = torch.arange(length) < counts
    return valid.flip(1) if left else valid


def valid_end(x: Tensor, dim: int, end: int, valid: Tensor) -> Tensor:
    """The first (0) or last (-1) valid entry of each row, in a loop over rows."""
    ends = [row.nonzero().flatten().tolist()[end] if row.any() else None for row in valid]
    zeros = torch.zeros_like(x.select(dim, 0)[0])
    return torch.stack([zeros if at is None else row.select(dim - 1, at) for row, at in zip(x, ends)])


def random_tensor(draw: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(999)), dtype=torch.float64)


def cross(shard: SequenceShard, draw: random.Random) -> None:
    """Compare everything that crosses borders for one length and dimension."""
    length, given = shard.num_chunks * draw.randint(1, 4) - shard.padding, draw.choice([1, 2, -1])
    dim = given % 3
    x = random_tensor(draw, *(length if d == dim else 3 - d for d in range(3)))
    offset, fill = draw.randint(-length - 1, length + 1), draw.choice([0, 1.5])
    valid = valid_rows(3, length, left=draw.random() < 0.5)
    own = own_part(shard, valid, 1, padding=True)
    to_segments: list[tuple[On, Of]] = [
        (lambda t, s: s.shift(t, offset, given, fill), lambda t: shifted(t, offset, dim, fill)),
        (lambda t, s: s.on_whole(lambda w: w.cumsum(dim), t, given), lambda t: t.cumsum(dim)),
        (lambda t, s: s.split(s.gather(t, given) ** 2, given), lambda t: t**2),
    ]
    of_all: list[tuple[On, Of]] = [
        (lambda t, s: s.sum(t, given), lambda t: t.sum(dim)),
        (lambda t, s: s.mean(t, given), lambda t: t.mean(dim)),
        (lambda t, s: s.first(t, given), lambda t: t.select(dim, 0)),
        (lambda t, s: s.last(t, given), lambda t: t.select(dim, -1)),
        (lambda t, s: s.first(t, given, own), lambda t: valid_end(t, dim, 0, valid)),
        (lambda t, s: s.last(t, given, own), lambda t: valid_end(t, dim, -1, valid)),
    ]
    for on_segment, on_whole in to_segments:
        compare(shard, x, dim, on_segment, on_whole, is_segment=True)
    for on_segment, on_whole in of_all:
        compare(shard, x, dim, on_segment, on_whole, is_segment=False)


def many_on_rank(rank: int, layout: str, seed: int) -> None:
    draw = random.Random(seed)
    for padded in (False, True) * 3:
        shard = shard_of(rank, layout)
        padding = draw.randrange(shard.num_chunks) if padded and shard.size > 1 else 0
        cross(shard_of(rank, layout, padding=padding), draw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_borders_are_crossed_as_on_one_device(world, size: int, layout: str) -> None:
    world.run(size, many_on_rank, layout, 10 * size)


def convolve(shard: SequenceShard, draw: random.Random) -> None:
    before, after, chunk = draw.randint(0, 5), draw.randint(0, 5), draw.randint(1, 6)
    length = shard.num_chunks * chunk - shard.padding
    x, kernel = random_tensor(draw, 2, 3, length), random_tensor(draw, 3, 3, before + 1 + after)
    compare(
        shard,
        x,
        2,
        lambda t, s: borders.with_halo(lambda u: F.conv1d(u, kernel), t, s, -1, before, after),
        lambda t: F.conv1d(F.pad(t, (before, after)), kernel),
        is_segment=True,
    )


def halo_on_rank(rank: int, layout: str, seed: int) -> None:
    draw = random.Random(seed)
    for padding in [0, 0, 1, dist.get_world_size() - 1] * 3:
        convolve(shard_of(rank, layout, per_rank=2, padding=padding), draw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3])
def test_halos_of_any_reach(world, size: int, layout: str) -> None:
    """Also of one that is longer than a chunk, for which neighbours are not enough."""
    world.run(size, halo_on_rank, layout, size)


def others_on_rank(rank: int) -> None:
    shard = shard_of(rank, "zigzag")
    tokens = torch.arange(16).view(2, 8)
    own = shard.split(tokens)
    assert torch.equal(shard.gather(shard.shift(own, 1, fill=-100)), F.pad(tokens[:, 1:], (0, 1), value=-100))
    assert shard.sum(own).dtype == torch.int64
    assert torch.equal(shard.sum(own), tokens.sum(1))
    assert torch.equal(shard.sum(own > 3), (tokens > 3).sum(1))
    with pytest.raises(RuntimeError, match="could not infer output dtype"):  # as torch does
        shard.mean(own)
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.complex64):
        x = (tokens % 3).to(dtype)
        assert torch.equal(shard.last(shard.split(x)), x[:, -1])
        assert torch.equal(shard.first(shard.split(x)), x[:, 0])
        assert torch.equal(shard.gather(shard.shift(shard.split(x), -3)), F.pad(x, (3, 0))[:, :8])
    x = torch.full((1, 8), float("nan"))  # what is not asked for leaves no trace
    x[:, 0] = 2.0
    assert shard.first(shard.split(x)).item() == 2.0
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(shard.mean(shard.split(x)), x.float().mean(1).bfloat16())  # rounded once


def test_tensors_of_any_dtype_cross_borders(world) -> None:
    world.run(2, others_on_rank)


def recurrent_on_rank(rank: int, layout: str) -> None:
    shard = shard_of(rank, layout)
    torch.manual_seed(0)
    lstm, x = nn.LSTM(3, 4, batch_first=True).double(), torch.randn(2, 12, 3, dtype=torch.float64)
    y, (h, c) = shard.on_whole(lstm, shard.split(x))
    expected, (last, cell) = lstm(x)
    assert_equal([y, h, c], [shard.split(expected), last, cell], 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recurrence_runs_on_the_whole_and_returns_its_state(world, layout: str) -> None:
    world.run(2, recurrent_on_rank, layout)


def test_one_device_needs_no_length_that_splits() -> None:
    x = torch.randn(2, 7)
    shard = SequenceShard()
    assert torch.equal(shard.shift(x, 2), F.pad(x[:, 2:], (0, 2)))
    assert torch.equal(shard.first(x), x[:, 0])
    assert torch.equal(shard.last(x), x[:, -1])
    assert shard.on_whole(lambda t: (t, "anything"), x) == (x, "anything")
    assert shard.mean(x).equal(x.mean(1))


def refused_on_rank(rank: int) -> None:
    shard = shard_of(rank, "zigzag")
    odd = torch.zeros(2, 3)
    calls: list[Callable[[], Any]] = [
        lambda: shard.shift(odd, 1),
        lambda: shard.on_whole(lambda t: t, odd),
        lambda: shard.first(odd),
        lambda: borders.with_halo(lambda t: t, odd, shard, 1, 0, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"length 6 cannot be split over 2 ranks"):
            call()
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"valid must be bool \[B, l\] = \[2, 4\].*Split it"):
        shard.first(x, valid=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        shard.last(x, valid=torch.ones(2, 4))
    with pytest.raises(ValueError, match="with dim=0"):
        shard.last(x, dim=0, valid=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"on_whole needs .* 8 positions .* dimension 1; got \[2\].*shard\.gather"):
        shard.on_whole(lambda t: t.sum(1), x)


def test_what_does_not_fit_is_refused_before_anything_is_sent(world) -> None:
    world.run(2, refused_on_rank)


def test_without_a_group_nobody_crosses() -> None:
    shard, x = SequenceShard(0, 2, "contiguous"), torch.zeros(1, 4)
    for call in (shard.sum, shard.mean, shard.first, shard.last, lambda t: shard.shift(t, 1)):
        with pytest.raises(RuntimeError, match="no process group"):
            call(x)
