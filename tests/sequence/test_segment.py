"""Split, gather and positions of a shard, the exact adjoint of the gather, and the modules that take a shard."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss.sequence.layout import STATIC_LAYOUTS
from lightning_lss.sequence.segment import (
    WHOLE_SEQUENCE,
    SequenceShard,
    ShardedModule,
    segment_local_names,
    segment_modules,
    sequence_shard,
)

L = 16
SHAPES = {0: (L, 3), 1: (2, L), 2: (2, 3, L, 5), -1: (3, L), -2: (2, L, 4)}  # by the dimension to cut


def shard_of(rank: int, layout: str) -> SequenceShard:
    return SequenceShard(rank, dist.get_world_size(), layout, dist.group.WORLD)


def numbered(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


# -- split, gather, positions ------------------------------------------------------------------------------------------


def round_trip(rank: int, layout: str) -> None:
    shard = shard_of(rank, layout)
    positions = shard.positions(L // shard.size)
    assert positions.dtype == torch.int64
    for dim, shape in SHAPES.items():
        x = numbered(shape)
        segment = shard.split(x, dim)
        assert torch.equal(segment, x.index_select(dim, positions))
        assert torch.equal(shard.gather(segment, dim), x)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_split_takes_the_positions_and_gather_puts_them_back(world, size, layout) -> None:
    world.run(size, round_trip, layout)


def round_trip_of_other_tensors(rank: int, layout: str) -> None:
    shard = shard_of(rank, layout)
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.bfloat16):
        x = (numbered((2, L)) % 3).to(dtype)
        gathered = shard.gather(shard.split(x))
        assert gathered.dtype == dtype
        assert torch.equal(gathered, x)
    transposed = numbered((L, 2, 3)).permute(1, 0, 2)  # [2, L, 3], not contiguous
    assert torch.equal(shard.gather(shard.split(transposed)), transposed)
    x = numbered((2, L))
    segment = shard.split(x).repeat_interleave(2, 1)[:, ::2]  # strided along the sequence
    assert torch.equal(shard.gather(segment), x)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_round_trip_of_any_dtype_and_stride(world, layout) -> None:
    world.run(2, round_trip_of_other_tensors, layout)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_chunks_by_rank_and_in_position_order(size, layout) -> None:
    x = numbered((2, 2 * 8 * 3, 5))
    shards = [SequenceShard(rank, size, layout) for rank in range(size)]
    segments = [shard.split(x) for shard in shards]
    for own, chunks in zip(segments, shards[0].chunks_by_rank(x, 1)):
        assert torch.equal(torch.cat(chunks, 1), own)
    assert torch.equal(torch.cat(shards[-1].chunks_in_order(torch.stack(segments), 1), 1), x)


def test_one_rank_gets_the_very_tensor() -> None:
    x = numbered((2, 7))  # of any length
    assert WHOLE_SEQUENCE.split(x) is x
    assert WHOLE_SEQUENCE.gather(x) is x
    assert WHOLE_SEQUENCE.positions(7).tolist() == list(range(7))


def test_a_length_that_cannot_be_shared_is_refused() -> None:
    shard = SequenceShard(0, 2, "zigzag")
    with pytest.raises(ValueError, match=r"length 6 .*divisible by 4 .*layout='contiguous'"):
        shard.split(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="length 6 "):
        shard.positions(3)
    with pytest.raises(ValueError, match="length 6 "):
        shard.local_length(6)
    with pytest.raises(ValueError, match="length 6 "):
        shard.gather(torch.zeros(1, 3))
    assert shard.local_length(8) == 4


# -- gradients ---------------------------------------------------------------------------------------------------------


def weights(rank: int) -> Tensor:
    """What the loss of a rank makes of each gathered element: another on every rank and in every place."""
    return torch.randn(2, L, 3, generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64)


def loss_of_rank(gathered: Tensor, rank: int, form: str) -> Tensor:
    if form == "transposed":  # its gradient arrives with strides of its own
        return (gathered.transpose(0, 1) * weights(rank).transpose(0, 1).contiguous()).sum()
    if form == "expanded":  # its gradient is one number with strides of 0
        return gathered.sum() * (rank + 1)
    return (gathered * weights(rank)).sum()


def gradient_on_rank(rank: int, layout: str, form: str) -> None:
    shard = shard_of(rank, layout)
    x = numbered((2, L, 3))
    segment = shard.split(x).clone().requires_grad_()
    loss_of_rank(shard.gather(segment), rank, form).backward()

    whole = x.requires_grad_()  # one process with the losses of all ranks
    sum(loss_of_rank(whole, other, form) for other in range(shard.size)).backward()
    # each rank adds up the same few numbers, only in another order: rounding of float64
    torch.testing.assert_close(segment.grad, shard.split(whole.grad), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("form", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_gradient_of_gather_sums_what_every_ranks_loss_says(world, size, layout, form) -> None:
    world.run(size, gradient_on_rank, layout, form)


def second_derivative_on_rank(rank: int) -> None:
    shard = shard_of(rank, "zigzag")
    x = numbered((2, L)).requires_grad_()
    (grad,) = torch.autograd.grad((shard.gather(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_second_derivative_of_gather_is_refused(world) -> None:
    # the reduce-scatter of the first is invisible to autograd: without a refusal the second would be wrong
    world.run(2, second_derivative_on_rank)


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_gradient_of_split_reaches_the_own_segment_only(layout) -> None:
    shard = SequenceShard(1, 2, layout)
    x = numbered((1, L)).requires_grad_()
    shard.split(x).sum().backward()
    own = torch.zeros(1, L, dtype=torch.float64)
    own[:, shard.positions(L // 2)] = 1
    assert torch.equal(x.grad, own)


# -- the shard as an object --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_group_is_refused(rank) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} .*size=2: use 0 to 1"):
        SequenceShard(rank, 2)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout='spiral' is unknown"):
        SequenceShard(0, 1, "spiral")


def test_gather_without_a_group_says_where_to_get_one() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 of 2.*no process group.*LSSStrategy\.sequence_shard"):
        SequenceShard(0, 2).gather(torch.zeros(1, 4))


def copies_on_rank(rank: int) -> None:
    shard = shard_of(rank, "contiguous")
    module = ShardedModule()
    module.set_shard(shard)
    assert copy.deepcopy(module).shard.group is shard.group
    assert copy.copy(shard).group is shard.group
    arrived = pickle.loads(pickle.dumps(shard))
    assert arrived == SequenceShard(rank, 2, "contiguous", group=None)


def test_copies_keep_the_group_and_pickles_drop_it(world) -> None:
    world.run(2, copies_on_rank)


# -- modules -----------------------------------------------------------------------------------------------------------


class WithTable(ShardedModule):
    segment_local = ("table", "counts")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2))
        self.shared = nn.Parameter(torch.zeros(2))
        self.register_buffer("counts", torch.zeros(2))


def test_sharded_modules_are_found_by_what_they_are() -> None:
    inner, outer = ShardedModule(), WithTable()
    outer.layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner))
    assert segment_modules(outer) == [outer, inner]
    assert inner.shard is WHOLE_SEQUENCE


def test_segment_local_names_are_those_of_the_root_and_its_children() -> None:
    assert segment_local_names(WithTable()) == ["table", "counts"]  # no leading dot
    nested = nn.Sequential(nn.Linear(2, 2), WithTable(), ShardedModule())
    assert segment_local_names(nested) == ["1.table", "1.counts"]
    known = dict([*nested.named_parameters(), *nested.named_buffers()])
    assert set(segment_local_names(nested)) <= known.keys()


def test_sequence_shard_is_trivial_without_a_trainer() -> None:
    assert sequence_shard(pl.LightningModule()) is WHOLE_SEQUENCE
    assert sequence_shard(nn.Linear(2, 2)) is WHOLE_SEQUENCE


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_sequence_shard_is_trivial_under_other_strategies(strategy) -> None:
    module = pl.LightningModule()
    module.trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False
    )
    assert sequence_shard(module) is WHOLE_SEQUENCE


def test_sequence_shard_is_that_of_the_strategy_or_the_module_itself() -> None:
    shard: Any = SequenceShard(1, 2)
    module = pl.LightningModule()
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(shard_of_module=shard))
    assert sequence_shard(module) is shard
    sharded = ShardedModule()
    sharded.set_shard(shard)
    assert sequence_shard(sharded) is shard
