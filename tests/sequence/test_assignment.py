"""Chunks in any assignment: every position has one holder, and split, gather and positions agree."""

import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_lss.sequence.assignment import ChunkAssignment, static_assignment
from lightning_lss.sequence.layout import STATIC_LAYOUTS
from lightning_lss.sequence.segment import SequenceShard


def make_assignment(size: int, per_rank: int, seed: int = 0) -> ChunkAssignment:
    """Chunks dealt out at random."""
    order = torch.randperm(size * per_rank, generator=torch.Generator().manual_seed(seed))
    return ChunkAssignment.from_owners(order % size, size)


def balanced(rank: int, assignment: ChunkAssignment, group: dist.ProcessGroup | None = None) -> SequenceShard:
    return SequenceShard(rank, assignment.size, "balanced", group, assignment=assignment)


@given(size=st.integers(1, 6), per_rank=st.integers(1, 5), chunk=st.integers(1, 4), seed=st.integers(0, 99))
def test_split_positions_and_ranges_agree(size, per_rank, chunk, seed) -> None:
    assignment = make_assignment(size, per_rank, seed)
    x = torch.arange(assignment.num_chunks * chunk)[None]
    segments = [balanced(rank, assignment).split(x) for rank in range(size)]
    for rank, segment in enumerate(segments):
        shard = balanced(rank, assignment)
        assert torch.equal(shard.positions(segment.size(1)), segment[0])
        assert [p for run in shard.ranges(x.size(1)) for p in run] == segment[0].tolist()
        assert shard.ranges(x.size(1)) == balanced(0, assignment).ranges(x.size(1), rank)
        assert shard.local_length(x.size(1)) == segment.size(1)
    assert torch.equal(torch.cat(balanced(0, assignment).chunks_in_order(torch.stack(segments), 1), 1), x)
    by_rank = balanced(0, assignment).chunks_by_rank(x, 1)
    assert [torch.cat(own, 1).tolist() for own in by_rank] == [segment.tolist() for segment in segments]
    assert assignment.tensor.tolist() == [list(own) for own in assignment.chunks]


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_static_layouts_are_assignments_too(size, layout) -> None:
    x = torch.arange(60)[None]
    for assignment in (static_assignment(size, layout), static_assignment(size, layout).refined(3)):
        for rank in range(size):
            expected = SequenceShard(rank, size, layout).split(x)
            assert torch.equal(balanced(rank, assignment).split(x), expected)


def gather(rank: int, seed: int) -> None:
    shard = balanced(rank, make_assignment(dist.get_world_size(), 3, seed), dist.group.WORLD)
    x = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = shard.split(x).requires_grad_()
    gathered = shard.gather(own)
    assert torch.equal(gathered, x)
    weights: Tensor = (rank + 1) * torch.arange(24.0, dtype=torch.float64)[None, :, None].expand_as(x)
    gathered.backward(weights)
    total = weights / (rank + 1) * sum(range(1, shard.size + 1))  # the sum over the ranks
    assert torch.equal(own.grad, shard.split(total))


def test_gather_restores_the_order_and_its_adjoint_sums_over_ranks(world) -> None:
    for seed in range(3):
        world.run(2, gather, seed)


def test_positions_without_a_batch_are_refused_with_the_remedy() -> None:
    shard = SequenceShard(0, 2, "balanced")
    for ask in (lambda: shard.positions(4), lambda: shard.split(torch.zeros(1, 8)), lambda: shard.num_chunks):
        with pytest.raises(RuntimeError, match=r"no batch now.*within a step.*layout='zigzag'"):
            ask()
    assert SequenceShard(0, 1, "balanced").positions(3).tolist() == [0, 1, 2]


def test_a_length_that_does_not_fit_the_chunks_is_refused() -> None:
    shard = balanced(0, make_assignment(2, 4))
    for ask in (lambda: shard.split(torch.zeros(1, 12)), lambda: shard.positions(6)):
        with pytest.raises(ValueError, match=r"length 12 .*divisible by 8 \(4 times.*layout='balanced' needs"):
            ask()


@pytest.mark.parametrize("chunks", [((0, 1), (2,)), ((0, 0), (1, 2)), ((1, 0), (2, 3)), ((0, 4), (1, 2)), ()])
def test_an_assignment_holds_every_chunk_once_in_equal_numbers_in_order(chunks) -> None:
    with pytest.raises(ValueError, match=r"must give each of the chunks"):
        ChunkAssignment(chunks)


def test_an_assignment_belongs_to_a_balanced_shard_of_its_size() -> None:
    for size, layout in ((2, "zigzag"), (4, "balanced")):
        with pytest.raises(ValueError, match=f"2 ranks does not fit layout='{layout}' and size={size}"):
            SequenceShard(0, size, layout, assignment=make_assignment(2, 2))


def test_an_assignment_is_a_value() -> None:
    one, same, other = make_assignment(2, 4), make_assignment(2, 4), make_assignment(2, 4, seed=1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    sent = pickle.loads(pickle.dumps(balanced(1, one)))
    assert sent == balanced(1, same)
    assert torch.equal(sent.positions(8), balanced(1, one).positions(8))
