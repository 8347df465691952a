"""Nvidia's sequence parallelism, the baseline: the same training as one process, with the collectives it should have."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_lss.megatron import DATA, TENSOR, own_key_value_heads, parallelize, reduce_gradients
from lightning_lss.model import Transformer, TransformerConfig
from tests.training import LENGTH, VOCAB, Run, SGDTransformer, fit, worst_difference


class DoubleTransformer(SGDTransformer):
    """In float64, for which ModelParallelStrategy has no precision plugin."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.double()


MODELS: dict[str, dict[str, Any]] = {
    "learned-tied": {"num_kv_heads": None},
    "rotary-untied-swiglu": {"positions": "rotary", "tie_embeddings": False, "mlp": "swiglu", "num_kv_heads": 4},
    "two-kv-heads": {"positions": "rotary", "num_kv_heads": 2},
    "one-kv-head-bidirectional": {"num_kv_heads": 1, "causal": False, "tie_embeddings": False},
    "heads-in-uneven-groups": {"width": 24, "num_heads": 12, "num_kv_heads": 3, "positions": "rotary"},
}
GRIDS = [(2, 2), (4, 4), (4, 2)]  # (W, S)


def fit_whole(rank: int, run: Run) -> dict[str, Tensor]:
    """As :func:`tests.training.fit`, with the weights put together over the ranks."""
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in fit(rank, run).items()}


def make_run(model: str = "learned-tied", clip: float = 0.3, accumulate: int = 1, **more: Any) -> Run:
    trainer = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    return Run(**{"module": DoubleTransformer, "model": MODELS[model], "trainer": trainer, **more})


@pytest.fixture(scope="module")
def one_process(world) -> Any:
    return cache(lambda *options: world.run(1, fit, make_run(*options))[0])


def assert_parity(states: list[dict[str, Tensor]], reference: dict[str, Tensor], bound: float) -> None:
    for rank, state in enumerate(states):
        difference, name = worst_difference(state, reference)
        assert difference <= bound, f"rank {rank}: {name} differs by {difference:.1e}"


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"W{grid[0]}S{grid[1]}")
@pytest.mark.parametrize("model", MODELS)
def test_trains_what_one_process_trains(world, one_process, model, grid) -> None:
    world_size, size = grid
    run = make_run(model, size=size, strategy={"megatron": True})
    assert_parity(world.run(world_size, fit_whole, run), one_process(model), 1e-10)


def test_gradients_accumulate(world, one_process) -> None:
    options = ("two-kv-heads", 0.3, 3)
    run = make_run(*options, size=2, strategy={"megatron": True})
    assert_parity(world.run(4, fit_whole, run), one_process(*options), 1e-10)
