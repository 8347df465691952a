"""Dropout is that of the whole sequence and repeats itself on replay; a sequence group shares its random numbers."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lss.nn.dropout import SegmentDropout
from lightning_lss.nn.recompute import apply_checkpointing, apply_tiles
from lightning_lss.parallel.broadcast import share_random_state
from lightning_lss.sequence.segment import SequenceShard, segment_modules
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from tests.modules import MaskedModule
from tests.training import Run, SGDTransformer, fit, make_module, make_samples, make_trainer, whole_state

P = 0.25


def dropout(rank: int = 0, size: int = 2, p: float = P, layout: str = "zigzag") -> SegmentDropout:
    module = SegmentDropout(p)
    module.set_shard(SequenceShard(rank, size, layout))
    return module


def seeded(module: nn.Module, x: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return module(x)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (3, 16, 5), (3, 16, 2, 4)])
def test_segments_have_the_masks_of_the_whole(layout, shape) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = seeded(SegmentDropout(P), x)
    for size in (2, 4):
        for rank in range(size):
            module = dropout(rank, size, layout=layout)
            dim = min(1, x.dim() - 1)
            assert torch.equal(seeded(module, module.shard.split(x, dim)), module.shard.split(whole, dim))


def test_masks_differ_from_call_to_call_and_repeat_with_the_seed() -> None:
    module, x = dropout(1), torch.ones(1000)
    first, second = seeded(module, x), module(x)
    assert not torch.equal(first, second)
    assert torch.equal(seeded(module, x), first)


def test_every_segment_advances_the_shared_stream_equally() -> None:
    after = []
    for rank in range(2):
        seeded(dropout(rank), torch.ones(10))
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_mean_is_kept_and_the_right_share_is_dropped() -> None:
    y = seeded(dropout(1), torch.ones(100_000))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / (1 - P)]))
    # shares of 100,000 scatter by sqrt(P (1 - P) / 100,000) = 0.0014, the mean by 4/3 of it
    assert (y == 0).float().mean().item() == pytest.approx(P, abs=5 * 0.0014)
    assert y.mean().item() == pytest.approx(1.0, abs=5 * 0.0019)
    assert y.var().item() == pytest.approx(P / (1 - P), abs=0.01)


def test_nothing_is_dropped_or_drawn_in_evaluation_or_with_p_0() -> None:
    x = torch.ones(100)
    for module in (dropout(1).eval(), dropout(1, p=0.0), SegmentDropout(P).eval()):
        assert torch.equal(seeded(module, x), x)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask_again(use_reentrant) -> None:
    layers = nn.Sequential(dropout(1), nn.Tanh(), dropout(1))
    x = torch.linspace(0.5, 2.0, 1000, dtype=torch.float64)
    plain, replayed = (x.clone().requires_grad_() for _ in range(2))
    seeded(layers, plain).sum().backward()
    torch.manual_seed(5)
    y = checkpoint(layers, replayed, use_reentrant=use_reentrant)
    torch.rand(7)  # the backward pass finds the generator elsewhere
    y.sum().backward()
    assert torch.equal(replayed.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay_and_the_gradient_has_the_mask(dtype) -> None:
    x = torch.ones(3, 0, 2, dtype=dtype)
    assert dropout(1)(x).shape == x.shape
    x = torch.ones(4, 50, 6, dtype=dtype).transpose(0, 1).requires_grad_()
    y = seeded(dropout(1), x)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert torch.equal(x.grad, y)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - P), dtype=dtype).item()}


def test_autograd_holds_a_byte_for_each_element() -> None:
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes), lambda x: x):
        dropout(1)(torch.ones(2, 8, 16, dtype=torch.float64, requires_grad=True))
    assert sum(held) == 2 * 8 * 16


def test_the_seed_comes_from_the_cpu_whatever_the_default_device_is() -> None:
    x = torch.ones(100)
    expected = seeded(dropout(1), x)
    with torch.device("meta"):
        assert torch.equal(seeded(dropout(1), x), expected)


def test_what_cannot_be_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs \[B, l, \.\.\.\], not a single number: use torch\.nn\.Dropout"):
        SegmentDropout(P)(torch.ones(()))
    with pytest.raises(ValueError, match="length 14 cannot be split over 2 ranks"):
        dropout(1)(torch.ones(2, 7))


class MLP(nn.Module):
    """Two dropouts, of which one is called twice, between layers that work token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(4, 8), nn.Linear(8, 4)
        self.inner, self.outer = SegmentDropout(P), SegmentDropout(P)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.out(self.inner(self.inner(torch.tanh(self.up(x))))))


def output_and_gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    y = seeded(module, x)
    after = torch.rand(())
    (y * torch.arange(1, y.numel() + 1).view(y.shape)).sum().backward()
    return [y.detach(), after, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("tiles", [2, 3, 5])
@pytest.mark.parametrize("around", ["none", "full", "selective"])
def test_tiles_along_the_sequence_have_the_masks_of_the_segment(tiles, around) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(MLP(), MLP()).double(), torch.randn(3, 10, 4, dtype=torch.float64)
    for part in segment_modules(module):
        part.set_shard(SequenceShard(1, 2))
    expected = output_and_gradients(module, x)
    apply_tiles([module[0]], tiles)
    apply_checkpointing([module], around)
    assert_equal(output_and_gradients(module, x), expected, 1e-12)
    with torch.no_grad():
        assert_equal([seeded(module, x)], expected[:1], 1e-12)


def test_what_is_not_a_tile_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(0, 1), SegmentDropout(P))
    apply_tiles([flat], 2)
    with pytest.raises(ValueError, match="given 4 positions in dimension 1, where the tile has 5"):
        flat(torch.ones(3, 10, 4))
    nested = nn.Sequential(MLP())
    apply_tiles([nested, nested[0]], 2)
    with pytest.raises(ValueError, match="contains another one: name only one of them in tiled_modules"):
        nested(torch.ones(3, 10, 4))
    apply_tiles([nested[0]], 1)
    assert nested(torch.ones(3, 10, 4)).shape == (3, 10, 4)  # an error leaves no tile behind


RUNS: dict[str, dict[str, Any]] = {
    "contiguous": {"layout": "contiguous"},
    "full": {"model": {"activation_checkpointing": "full"}},
    "selective": {"layout": "contiguous", "model": {"activation_checkpointing": "selective", "mlp_tiles": 2}},
    "offload": {"model": {"activation_checkpointing": "offload"}},
    "rotary": {"model": {"positions": "rotary"}},
    "sharded": {"strategy": {"sharding": "fsdp"}},
}
GRIDS = {"contiguous": (1, 2, 4), "full": (2, 4), "rotary": (1, 2, 4)}  # W = S


class DropsInItsMLP(SGDTransformer):
    """Dropout within the MLP too, which tiles compute in parts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.mlp.out = nn.Sequential(SegmentDropout(0.2), block.mlp.out)


def run_of(size: int = 1, layout: str = "zigzag", model: Any = None, **more: Any) -> Run:
    model = {"dropout": 0.3, **(model or {})}
    trainer = {"precision": "64-true", "accumulate_grad_batches": 2}
    return Run(size=size, layout=layout, module=DropsInItsMLP, model=model, trainer=trainer, **more)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_training_at_every_s_and_layout(world, name) -> None:
    options = RUNS[name]
    positions = options.get("model", {}).get("positions", "learned")
    expected = world.run(1, fit, run_of(model={"positions": positions}))[0]  # without a strategy
    for size in GRIDS.get(name, (2,)):
        own = {**options, "strategy": {"check_batches": 1, **options.get("strategy", {})}}
        assert_equal_on_ranks(world.run(size, fit, run_of(size, **own)), expected, 1e-10)


def test_replicas_train_as_without_splitting(world) -> None:
    expected = world.run(2, fit, run_of(strategy={"check_batches": 1}))[0]
    assert_equal_on_ranks(world.run(4, fit, run_of(2, strategy={"check_batches": 1})), expected, 1e-10)


class DropsAttention(MaskedModule):
    """Dropout in attention alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.dropout = SegmentDropout(0.0)


@pytest.mark.parametrize("module", [SGDTransformer, DropsAttention])
def test_each_replica_draws_its_own_masks(world, module) -> None:
    """Those of one device only where there is one replica."""
    run: dict[str, Any] = {"module": module, "model": {"dropout": 0.3}, "trainer": {"precision": "64-true"}}
    expected = world.run(1, fit, Run(**run))[0]
    assert_equal_on_ranks(world.run(2, fit, Run(2, **run)), expected, 1e-10)
    assert worst_difference(world.run(2, fit, Run(1, **run))[0], expected).error > 1e-3


class RecordsOrder(SGDTransformer):
    """Records the first token of each sample of each batch."""

    def on_fit_start(self) -> None:
        self.order: list[list[int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.order.append(batch["number"].tolist())


class DropsAsTorch(RecordsOrder):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "dropout": 0.0})
        for block in self.model.blocks:
            block.mlp.out = nn.Sequential(nn.Dropout(0.3), block.mlp.out)


def shuffled_fit(
    rank: int, size: int, module: type[RecordsOrder], seed: int | None = None
) -> tuple[list[list[int]], dict[str, Tensor]]:
    run = Run(
        size=size,
        module=module,
        steps=-1,
        model={"dropout": 0.3},
        trainer={"precision": "64-true", "max_epochs": 3, "use_distributed_sampler": True},
        strategy={"check_batches": 1} if size > 1 else {},
    )
    samples = [{**x, "number": torch.tensor(i)} for i, x in enumerate(make_samples(12))]
    model, trainer = make_module(run), make_trainer(rank, run)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    trainer.fit(model, DataLoader(samples, 4, shuffle=True, generator=generator))
    return model.order, whole_state(model)


def test_the_order_of_later_epochs_is_that_of_one_device(world) -> None:
    """A loader that shuffles takes its order from the generator that the seeds of masks come from."""
    [(order, expected)] = world.run(1, shuffled_fit, 1, RecordsOrder)
    assert [sorted(itertools.chain(*order[i : i + 3])) for i in (0, 3, 6)] == [list(range(12))] * 3
    assert order[:3] != order[3:6] != order[6:]
    for size in (2, 4):
        orders, states = zip(*world.run(size, shuffled_fit, size, RecordsOrder))
        assert list(orders) == [order] * size
        assert_equal_on_ranks(states, expected, 1e-10)


def test_masks_of_torchs_dropout_are_others_and_so_is_the_order_after_them(world) -> None:
    """Torch draws as many numbers as there are elements, and a segment has fewer."""
    for seed in (None, 3):
        [(order, expected)] = world.run(1, shuffled_fit, 1, DropsAsTorch, seed)
        orders, states = zip(*world.run(2, shuffled_fit, 2, DropsAsTorch, seed))
        assert worst_difference(states[0], expected).error > 1e-3
        assert orders[0] == orders[1]
        assert orders[0][:3] == order[:3]
        assert (orders[0][3:] == order[3:]) == (seed is not None)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2])
def test_a_probability_outside_the_range_is_refused(p) -> None:
    with pytest.raises(ValueError, match=rf"p={p} must be in \[0, 1\)"):
        SegmentDropout(p)


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the state that libraries use


def draws_on_rank(rank: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    own = draw()
    random.seed(rank)
    np.random.seed(rank)  # noqa: NPY002
    torch.manual_seed(rank)
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    share_random_state(pair, torch.device("cpu"))
    return own, draw(), draw()


def test_a_sequence_group_continues_with_the_states_of_its_first_rank(world) -> None:
    ranks = world.run(4, draws_on_rank)
    for rank, (_, shared, next_shared) in enumerate(ranks):
        first_own, first_shared, first_next = ranks[rank // 2 * 2]
        assert shared == first_own == first_shared
        assert next_shared == first_next
    assert ranks[0][1] != ranks[2][1]  # another group keeps another state
