"""The learned table is one table however it is spread."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lss.nn.positions import DeferredTable, InitialRows, SegmentPositionalEmbedding
from lightning_lss.sequence.layout import STATIC_LAYOUTS, position_ranges
from lightning_lss.sequence.segment import WHOLE_SEQUENCE, SequenceShard

NUM, DIM = 24, 4


def make_table(shard: SequenceShard = WHOLE_SEQUENCE, num_positions: int = NUM, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    table = SegmentPositionalEmbedding(num_positions, DIM)
    if shard.size > 1:
        table.set_shard(shard)
    return table


def whole_table(num_positions: int = NUM) -> Tensor:
    return make_table(num_positions=num_positions).weight.detach().clone()


def is_deferred(table: SegmentPositionalEmbedding) -> bool:
    return isinstance(table.weight, DeferredTable)


# -- initial rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_positions", [NUM, 240, 768, 1200])  # within a block of 256 rows, and over several
@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_position_starts_from_the_same_row_whatever_the_spread(size, layout, num_positions) -> None:
    whole = whole_table(num_positions)
    for rank in range(size):
        shard = SequenceShard(rank, size, layout)
        table = make_table(shard, num_positions)
        assert torch.equal(table.weight, whole[shard.positions(num_positions // size)])


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_a_table_that_was_looked_at_before_it_is_spread_keeps_its_rows(layout) -> None:
    shard = SequenceShard(1, 2, layout)
    touched = make_table()
    assert touched.weight.shape == (NUM, DIM)
    touched.set_shard(shard)
    assert torch.equal(touched.weight, make_table(shard).weight)


def test_initial_rows_are_normal_and_differ() -> None:
    rows = InitialRows((range(2000),), 8, std=0.02, seed=1).draw()
    # the mean of 16,000 numbers scatters by 0.02 / sqrt(16,000) = 1.6e-4, their deviation by 0.02 / sqrt(32,000)
    assert abs(rows.mean()) < 5 * 1.6e-4
    assert rows.std().item() == pytest.approx(0.02, abs=5 * 1.1e-4)
    assert len(rows.unique(dim=0)) == 2000
    assert not torch.equal(rows, InitialRows((range(2000),), 8, std=0.02, seed=2).draw())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_initial_rows_do_not_depend_on_the_default_dtype(dtype) -> None:
    # Lightning sets it around the forward pass of 'bf16-true', where one device would build its table
    expected = InitialRows((range(NUM),), DIM, 0.02, seed=1).draw()
    torch.set_default_dtype(dtype)
    try:
        rows = InitialRows((range(NUM),), DIM, 0.02, seed=1).draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, expected)


def test_initial_rows_do_not_depend_on_the_default_device() -> None:
    # Lightning sets it to the GPU around configure_model, where the generators of the CPU would not serve
    expected = InitialRows((range(NUM),), DIM, 0.02, seed=1).draw()
    with torch.device("meta"):
        rows = InitialRows((range(NUM),), DIM, 0.02, seed=1).draw()
    assert rows.device == torch.device("cpu")
    assert torch.equal(rows, expected)


def test_one_number_is_drawn_from_the_default_generator_whatever_the_size() -> None:
    torch.manual_seed(0)
    SegmentPositionalEmbedding(8, 2)
    after_small = torch.rand(1)
    torch.manual_seed(0)
    SegmentPositionalEmbedding(4096, 64)
    assert torch.equal(torch.rand(1), after_small)


# -- the deferred table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "touch",
    [
        lambda weight: weight.shape,
        lambda weight: weight.numel(),
        lambda weight: weight.sum(),
        lambda weight: weight.detach(),
        lambda weight: torch.stack([weight, weight]),
        lambda weight: torch.add(torch.zeros(()), other=weight),
        lambda weight: nn.init.zeros_(weight),
        lambda weight: weight.data,
    ],
)
def test_it_is_built_at_the_first_touch_and_stays_the_same_object(touch) -> None:
    table = make_table()
    weight = table.weight
    assert type(weight) is DeferredTable
    touch(weight)
    assert type(weight) is nn.Parameter
    assert table.weight is weight
    assert weight.shape == (NUM, DIM)


@pytest.mark.parametrize("name", ["device", "dtype", "grad", "is_leaf", "requires_grad"])
def test_metadata_can_be_read_without_building_it(name) -> None:
    table = make_table()
    getattr(table.weight, name)
    assert is_deferred(table)


def test_it_is_a_parameter_before_it_is_built() -> None:
    table = make_table()
    assert list(dict(table.named_parameters())) == ["weight"]
    assert isinstance(table.weight, nn.Parameter)
    assert table.weight.requires_grad
    assert table.weight.is_leaf
    assert is_deferred(table)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_was_made_before_the_first_forward_steps_it(optimizer_class) -> None:
    table = make_table()
    optimizer = optimizer_class(table.parameters(), lr=0.5)
    table(NUM).sum().backward()
    optimizer.step()
    assert not torch.allclose(table.weight, whole_table(), atol=0.1)


def test_the_first_touch_may_come_in_inference_mode() -> None:
    table = make_table()
    with torch.inference_mode():
        table(NUM)
    assert not table.weight.is_inference()
    table(NUM).sum().backward()
    assert torch.equal(table.weight.grad, torch.ones(NUM, DIM))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_takes_the_dtype_it_is_moved_to(dtype) -> None:
    table = make_table().to(dtype)
    assert table.weight.dtype == dtype
    assert torch.equal(table.weight, whole_table().to(dtype))


def test_a_deep_copy_stays_unbuilt_and_is_independent() -> None:
    table = make_table()
    twin = copy.deepcopy(table)
    assert is_deferred(table)
    assert is_deferred(twin)
    assert twin.weight is not table.weight
    twin.set_shard(SequenceShard(1, 2, "contiguous"))
    assert torch.equal(table.weight, whole_table())
    assert torch.equal(twin.weight, whole_table()[NUM // 2 :])


def test_a_pickle_stays_unbuilt_and_small() -> None:
    table = make_table(num_positions=100_000)
    sent = pickle.dumps(table)
    assert is_deferred(table)
    assert len(sent) < 10_000
    arrived = pickle.loads(sent)
    assert is_deferred(arrived)
    assert torch.equal(arrived.weight, whole_table(100_000))


@pytest.mark.parametrize("shard", [WHOLE_SEQUENCE, SequenceShard(1, 2)])
def test_a_built_table_is_copied_and_pickled_with_its_values(shard) -> None:
    table = make_table(shard)
    nn.init.constant_(table.weight, 2.0)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin.weight, torch.full((NUM // shard.size, DIM), 2.0))
        assert twin.shard == shard


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_no_rank_holds_more_than_its_own_rows_when_the_shard_comes_first(monkeypatch, layout) -> None:
    made = []

    def spy(rows: InitialRows, draw: Any = InitialRows.draw) -> Tensor:
        made.append(draw(rows))
        return made[-1]

    monkeypatch.setattr(InitialRows, "draw", spy)
    table = make_table(SequenceShard(2, 4, layout), num_positions=800)
    table(200).sum().backward()
    assert [x.shape for x in made] == [(200, DIM)]
    assert table.weight.untyped_storage().nbytes() == 200 * DIM * 4


def test_cutting_a_built_table_lets_go_of_the_rest() -> None:
    table = make_table()
    table(NUM).sum().backward()
    table.set_shard(SequenceShard(0, 2, "contiguous"))
    assert table.weight.untyped_storage().nbytes() == NUM // 2 * DIM * 4
    assert table.weight.grad is None


def become_whole_on_rank(rank: int, layout: str) -> Any:
    shard = SequenceShard(rank, 2, layout, dist.group.WORLD)
    table = make_table(shard)
    table(NUM // 2).sum().backward()
    weight = table.weight
    table.become_whole()
    assert table.weight is weight
    assert weight.grad is None  # that of the own rows no longer fits
    assert torch.equal(table(NUM), weight)
    return weight.detach(), table.shard


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_a_spread_table_can_become_whole_again(world, layout) -> None:
    for rows, shard in world.run(2, become_whole_on_rank, layout):
        assert torch.equal(rows, whole_table())
        assert shard == WHOLE_SEQUENCE


# -- forward and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_forward_gives_the_rows_of_the_local_positions_with_their_gradients(layout) -> None:
    upstream = torch.randn(NUM, DIM, generator=torch.Generator().manual_seed(0))
    for rank in range(2):
        shard = SequenceShard(rank, 2, layout)
        table = make_table(shard)
        rows = table(NUM // 2)
        rows.backward(shard.split(upstream, 0))
        assert torch.equal(rows, shard.split(whole_table(), 0))
        assert torch.equal(table.weight.grad, shard.split(upstream, 0))


@pytest.mark.parametrize("length", [1, 10, NUM])
def test_one_rank_takes_any_length_up_to_the_table(length) -> None:
    assert torch.equal(make_table()(length), whole_table()[:length])


def test_a_longer_sequence_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length 25 does not fit .*24 positions.*at most.*num_positions.*'rotary'"):
        make_table()(NUM + 1)


@pytest.mark.parametrize("local_length", [6, 10, 24])
def test_with_ranks_any_other_length_than_the_tables_is_refused(local_length) -> None:
    words = rf"length {2 * local_length} \({local_length} on each of 2 ranks\).*24 positions.*exactly.*RotaryEmbedding"
    with pytest.raises(ValueError, match=words):
        make_table(SequenceShard(0, 2))(local_length)


@pytest.mark.parametrize("touched", [False, True])
def test_a_table_that_cannot_be_shared_out_is_refused(touched) -> None:
    table = make_table(num_positions=10)
    if touched:
        assert table.weight.shape == (10, DIM)
    with pytest.raises(ValueError, match="length 10 cannot be split over 4 ranks"):
        table.set_shard(SequenceShard(0, 4, "contiguous"))


@pytest.mark.parametrize("other", [SequenceShard(1, 2), SequenceShard(0, 2, "contiguous"), WHOLE_SEQUENCE])
def test_a_spread_table_cannot_serve_another_segment(other) -> None:
    table = make_table(SequenceShard(0, 2, "zigzag"))
    with pytest.raises(RuntimeError, match=r"rows of segment 0 of 2 \(zigzag\) .*load one from a checkpoint"):
        table.set_shard(other)
    table.set_shard(SequenceShard(0, 2, "zigzag"))  # its own again


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_sizes_must_be_positive(sizes) -> None:
    with pytest.raises(ValueError, match=f"num_positions={sizes[0]} and dim={sizes[1]} must be positive"):
        SegmentPositionalEmbedding(*sizes)


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_the_state_dict_of_one_rank_is_the_whole_table() -> None:
    table = make_table()
    state = table.state_dict()
    assert list(state) == ["weight"]
    assert type(state["weight"]) is Tensor
    assert torch.equal(state["weight"], whole_table())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", STATIC_LAYOUTS)
def test_loading_a_whole_table_keeps_the_own_rows(layout, assign) -> None:
    saved = {"0.weight": torch.randn(NUM, DIM)}
    shard = SequenceShard(1, 2, layout)
    model = nn.Sequential(make_table(shard))
    model.load_state_dict(saved, assign=assign)
    assert torch.equal(model[0].weight, shard.split(saved["0.weight"], 0))
    assert saved["0.weight"].shape == (NUM, DIM)  # the caller's dict is as it was


def test_loading_before_the_table_is_spread() -> None:
    saved = {"weight": torch.randn(NUM, DIM)}
    table = make_table()
    table.load_state_dict(saved)
    assert torch.equal(table.weight, saved["weight"])
    table.set_shard(SequenceShard(1, 2, "contiguous"))
    assert torch.equal(table.weight, saved["weight"][NUM // 2 :])


def test_a_ranks_own_state_can_be_loaded_back() -> None:
    table, other = make_table(SequenceShard(1, 2)), make_table(SequenceShard(1, 2), seed=4)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.weight, table.weight)


def test_a_table_of_another_length_is_refused_on_loading() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        make_table(SequenceShard(1, 2)).load_state_dict({"weight": torch.zeros(NUM + 1, DIM)})


def test_ranges_of_a_table_are_those_of_its_shard() -> None:
    assert make_table(SequenceShard(1, 3, "zigzag")).row_ranges() == position_ranges(NUM, 1, 3, "zigzag")
