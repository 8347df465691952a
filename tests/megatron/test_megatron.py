"""Nvidia's sequence parallelism, the baseline: the same training as one process, with the collectives it should have."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_lss.attention.module import LSSAttention
from lightning_lss.checkpoint import consolidate
from lightning_lss.checkpoint.folder import load_folder
from lightning_lss.megatron.parallelize import (
    DATA,
    TENSOR,
    own_key_value_heads,
    parallelize,
    reduce_gradients,
)
from lightning_lss.models.transformer import ExecutionConfig, MLPBlock, Transformer, TransformerConfig
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.testing.collectives import CollectiveCounter, kinds
from lightning_lss.testing.compare import assert_equal_on_ranks
from tests.training import (
    LENGTH,
    VOCAB,
    Run,
    SGDTransformer,
    as_rank,
    fit,
    make_module,
    make_samples,
)


class DoubleTransformer(SGDTransformer):
    """In float64, for which ModelParallelStrategy has no precision plugin."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.double()


class AdamTransformer(DoubleTransformer):
    """With moments to save."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


MODELS: dict[str, dict[str, Any]] = {
    "learned-tied": {"num_kv_heads": None},
    "rotary-untied-swiglu": {"positions": "rotary", "tie_embeddings": False, "mlp": "swiglu", "num_kv_heads": 4},
    "two-kv-heads": {"positions": "rotary", "num_kv_heads": 2, "head_chunks": 2},
    "one-kv-head-bidirectional": {"num_kv_heads": 1, "causal": False, "tie_embeddings": False},
    "recomputed-in-tiles": {"activation_checkpointing": "full", "mlp_tiles": 2, "vocab_size": 40},
    "attention-kept": {"activation_checkpointing": "selective", "tie_embeddings": False, "vocab_size": 40},
    "heads-in-uneven-groups": {"width": 24, "num_heads": 12, "num_kv_heads": 3, "positions": "rotary"},
}
GRIDS = [(2, 2), (4, 4), (4, 2)]  # (W, S)


def fit_whole(rank: int, run: Run) -> dict[str, Tensor]:
    """As :func:`tests.training.fit`, with the weights put together over the ranks."""
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in fit(rank, run).items()}


def make_run(model: str = "learned-tied", accumulate: int = 1, **more: Any) -> Run:
    trainer = {"gradient_clip_val": 0.3, "accumulate_grad_batches": accumulate}
    return Run(**{"module": DoubleTransformer, "model": MODELS[model], "trainer": trainer, **more})


@pytest.fixture(scope="module")
def one_process(world) -> Any:
    return cache(lambda *options: world.run(1, fit, make_run(*options))[0])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"W{grid[0]}S{grid[1]}")
@pytest.mark.parametrize("model", MODELS)
def test_trains_what_one_process_trains(world, one_process, model, grid) -> None:
    world_size, size = grid
    run = make_run(model, size=size, strategy={"megatron": True})
    assert_equal_on_ranks(world.run(world_size, fit_whole, run), one_process(model), 1e-10)


def test_gradients_accumulate(world, one_process) -> None:
    options = ("two-kv-heads", 3)
    run = make_run(*options, size=2, strategy={"megatron": True})
    assert_equal_on_ranks(world.run(4, fit_whole, run), one_process(*options), 1e-10)


def test_float32_without_clipping_and_with_a_table_that_is_built_in_parts(world) -> None:
    # .double() has the whole table built before the model is shared out; clipping hides a scale
    common = {"module": SGDTransformer, "trainer": {}}
    reference = world.run(1, fit, make_run(**common))[0]
    states = world.run(4, fit_whole, make_run(size=4, strategy={"megatron": True}, **common))
    assert_equal_on_ranks(states, reference, 1e-5)


class Unequal(DoubleTransformer):
    """Starts from other weights on every rank, as a module does that is built without a seed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += dist.get_rank()


@pytest.mark.parametrize("steps", [0, 2])
def test_ranks_start_from_the_first_one(world, steps) -> None:
    common = {"module": Unequal, "model": {"positions": "rotary"}, "steps": steps, "trainer": {}}
    reference = world.run(1, fit, Run(**common))[0]
    run = Run(size=2, strategy={"megatron": True}, **common)
    assert_equal_on_ranks(world.run(4, fit_whole, run), reference, 1e-10)


def count_left_over(rank: int, checkpointing: str, tiles: int) -> int:
    """How many queries of attention, and results of the MLP, are still there when a training step is over."""
    config = TransformerConfig(vocab_size=40, width=16, num_heads=4, positions="rotary")
    model = Transformer(config, ExecutionConfig(activation_checkpointing=checkpointing, mlp_tiles=tiles))
    parallelize(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA, TENSOR)))
    seen: dict[type[nn.Module], list[StorageWeakRef]] = {LSSAttention: [], MLPBlock: []}
    for module in model.modules():
        if isinstance(module, LSSAttention):
            module.register_forward_pre_hook(lambda _, inputs: seen[LSSAttention].append(storage_of(inputs[0])))
        elif isinstance(module, MLPBlock):
            module.register_forward_hook(lambda _, inputs, output: seen[MLPBlock].append(storage_of(output)))
    model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert len(seen[LSSAttention]) == 2 * config.num_layers
    assert len(seen[MLPBlock]) >= config.num_layers
    return sum(not storage.expired() for storages in seen.values() for storage in storages)


def storage_of(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(getattr(x, "elem", x).untyped_storage())  # what a collective returns wraps its tensor


@pytest.mark.parametrize("checkpointing", ["full", "selective", "offload"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_nothing_that_was_computed_again_is_left_over(world, checkpointing, tiles) -> None:
    # what a collective returns and nobody waits for stays, with all that it was computed from
    assert world.run(2, count_left_over, checkpointing, tiles) == [0, 0]


def epochs(count: int, **more: Any) -> Run:
    """Epochs of two steps each; Lightning resumes at the start of an epoch."""
    trainer = {"max_epochs": count, "gradient_clip_val": 0.3}
    return make_run("two-kv-heads", module=AdamTransformer, samples=8, steps=-1, trainer=trainer, **more)


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(world, tmp_path, folder) -> None:
    path = str(tmp_path / "half.ckpt")
    common = {"size": 2, "strategy": {"megatron": True, "save_distributed_checkpoint": folder}}
    world.run(2, fit_whole, epochs(1, save=path, **common))
    resumed = world.run(2, fit_whole, epochs(2, resume=path, **common))
    unbroken = world.run(1, fit, epochs(2))[0]
    assert_equal_on_ranks(resumed if folder else resumed[:1], unbroken, 1e-8)  # a whole state is given to rank 0 alone


def test_a_file_is_any_strategys(world, tmp_path) -> None:
    path = str(tmp_path / "whole.ckpt")
    run = make_run(size=4, save=path, strategy={"megatron": True, "save_distributed_checkpoint": False})
    state = world.run(4, fit_whole, run)[0]
    assert_equal_on_ranks([dict(DoubleTransformer.load_from_checkpoint(path).state_dict())], state, 0.0)


def test_a_folder_becomes_a_file_that_any_strategy_resumes(world, tmp_path) -> None:
    folder, file = str(tmp_path / "half.ckpt"), str(tmp_path / "file.ckpt")
    world.run(
        2, fit_whole, epochs(1, size=2, save=folder, strategy={"megatron": True, "save_distributed_checkpoint": True})
    )
    with pytest.raises(ValueError, match=r"checkpoint\.consolidate\("):
        load_folder(Path(folder))
    consolidate(folder, file)
    unbroken = world.run(1, fit, epochs(2))[0]
    assert_equal_on_ranks(world.run(2, fit_whole, epochs(2, size=2, resume=file)), unbroken, 1e-8)


def shared_out(config: TransformerConfig, mesh: DeviceMesh) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(config)
    parallelize(model, mesh)
    return model


def count_collectives(rank: int, model: dict[str, Any]) -> list[dict[str, int]]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA, TENSOR))
    config = TransformerConfig(**{"vocab_size": VOCAB, "seq_len": LENGTH, "width": 16, "num_layers": 3, **model})
    transformer = shared_out(config, mesh)
    with CollectiveCounter() as counter:
        logits = transformer(torch.zeros(3, LENGTH // 2, dtype=torch.int64))
        counter.phase = "backward"
        logits.sum().backward()
        counter.phase = "after"
        reduce_gradients(transformer.parameters(), mesh)
    return [kinds(counter.tally, phase) for phase in ("forward", "backward", "after")]


@pytest.mark.parametrize("model", ["learned-tied", "rotary-untied-swiglu", "one-kv-head-bidirectional"])
def test_four_collectives_a_layer_each_way_and_one_a_step(world, model) -> None:
    for forward, backward, after in world.run(2, count_collectives, MODELS[model]):
        assert forward == backward == {"all_gather": 2 * 3, "reduce_scatter": 2 * 3}
        assert after == {"all_reduce": 1}


def hold_of_weights(rank: int, config: TransformerConfig) -> tuple[float, int]:
    """The part of the blocks' matrices and of the positions that this rank has in memory, and how many weights there
    are in all."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=(DATA, TENSOR))
    model = shared_out(config, mesh)
    shared = [x for x in model.blocks.parameters() if x.dim() > 1] + list(model.positions.parameters())
    held = sum(x.to_local().untyped_storage().nbytes() for x in shared)
    return held / sum(4 * x.numel() for x in shared), count_parameters(model, 4)


def test_a_rank_holds_its_share_of_the_weights(world) -> None:
    config = TransformerConfig(seq_len=64, width=32)
    assert world.run(4, hold_of_weights, config) == [(0.25, count_parameters(Transformer(config)))] * 4


def drop_masks(rank: int) -> Tensor:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA, TENSOR))
    model = shared_out(TransformerConfig(width=16, num_heads=2, num_layers=1, seq_len=LENGTH, dropout=0.5), mesh)
    return model.dropout(torch.ones(2, LENGTH // 2, 16))


def test_dropout_differs_from_segment_to_segment(world) -> None:
    first, second = world.run(2, drop_masks)
    assert (first != second).float().mean() > 0.3


@pytest.mark.parametrize(
    ("config", "size", "heads"),
    [((8, 2), 4, [[0], [0], [1], [1]]), ((8, 4), 2, [[0, 1], [2, 3]]), ((12, 3), 4, [[0], [0, 1, 1], [1, 1, 2], [2]])],
)
def test_key_value_heads_of_a_rank(config, size, heads) -> None:
    sizes = TransformerConfig(width=96, num_heads=config[0], num_kv_heads=config[1])
    assert [own_key_value_heads(sizes, rank, size) for rank in range(size)] == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "width": 24}, "num_heads=3 .* 2 tensor-parallel ranks"),
        ({"mlp_width": 33}, "hidden width of 33 .* multiple of 2"),
        ({"seq_len": 17}, "length 17 cannot be split over 2 ranks"),
    ],
)
def test_sizes_that_cannot_be_shared_out_are_refused(world, options, message) -> None:
    world.run(2, refuse_sizes, options, message)


def refuse_sizes(rank: int, options: dict[str, Any], message: str) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=(DATA, TENSOR))
    with pytest.raises(ValueError, match=message):
        parallelize(Transformer(TransformerConfig(**options)), mesh)


def fit_refused(rank: int, run: Run) -> str:
    with pytest.raises((ValueError, MisconfigurationException)) as refusal:
        fit(rank, run)
    return str(refusal.value)


def test_refusals_on_every_rank(world) -> None:
    for message in world.run(2, fit_refused, make_run(model="learned-tied", size=3, strategy={"megatron": True})):
        assert "sequence_parallel_size=3 does not divide the world size 2" in message
    short = Run(size=2, strategy={"megatron": True}, model={"seq_len": 2 * LENGTH, "positions": "learned"})
    for message in world.run(2, fit_refused, short):
        assert "length 16 (8 on each of 2 ranks) does not fit a learned table of 32 positions" in message


def fit_under_plain_model_parallel(rank: int) -> str:
    as_rank(rank)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(1, 2), logger=False)
    with pytest.raises(MisconfigurationException) as refusal:
        trainer.fit(make_module(Run(strategy={"megatron": True})), make_samples(4))
    return str(refusal.value)


def test_lightnings_own_strategy_is_refused_for_what_it_leaves_out(world) -> None:
    for message in world.run(2, fit_under_plain_model_parallel):
        assert "MegatronStrategy" in message
