"""``torch.compile`` of whole models and of single blocks, without a graph break, on split sequences."""

import shutil
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lightning_lss import AttentionMask, LSSAttention, SegmentDropout
from lightning_lss.models.lightning_module import LSSTransformer
from lightning_lss.models.transformer import Block, Transformer, TransformerConfig
from lightning_lss.sequence.assignment import ChunkAssignment
from lightning_lss.sequence.segment import SequenceShard, segment_modules
from lightning_lss.testing.compare import assert_equal
from tests.training import Run, fit, make_loader, make_module, make_samples, make_trainer

CONFIG = TransformerConfig(vocab_size=11, seq_len=32, width=32, num_layers=2, num_heads=4, num_kv_heads=2)


def gradients(model: Transformer, forward: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    forward(tokens).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare(rank: int, layout: str, whole: bool, options: dict[str, Any], padding: int) -> None:
    torch.manual_seed(0)
    model = LSSTransformer(CONFIG, **options).model.double()
    shard = SequenceShard(rank, dist.get_world_size(), layout, dist.group.WORLD, padding=padding)
    for module in segment_modules(model):
        module.set_shard(shard)
    tokens = shard.split(torch.randint(11, (2, CONFIG.seq_len - padding)))
    expected = gradients(model, model, tokens)
    if whole:
        forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        forward = model
        for block in model.blocks:
            block.compile_forward(backend="aot_eager", fullgraph=True)
    assert_equal(gradients(model, forward, tokens), expected, 1e-12)


@pytest.mark.parametrize(
    ("layout", "whole", "options", "padding"),
    [
        ("zigzag", True, {"positions": "rotary"}, 0),
        ("contiguous", True, {"positions": "learned", "keep_gathered": True}, 0),
        ("zigzag", True, {"positions": "rotary", "activation_checkpointing": "selective"}, 0),
        ("zigzag", True, {"activation_checkpointing": "full", "mlp_tiles": 2}, 0),
        ("zigzag", False, {"positions": "rotary", "activation_checkpointing": "selective", "mlp_tiles": 2}, 0),
        ("zigzag", False, {"activation_checkpointing": "offload"}, 0),
        ("zigzag", False, {"positions": "rotary", "causal": False}, 3),
    ],
)
def test_compiled_models_have_no_graph_break_and_the_same_gradients(world, layout, whole, options, padding) -> None:
    world.run(2, compare, layout, whole, options, padding, timeout=200)


@pytest.mark.parametrize("module", [LSSAttention, SegmentDropout])
def test_with_dropout_the_graph_breaks_where_a_seed_is_drawn_and_nowhere_else(module) -> None:
    x = torch.randn(1, 2, 8, 4)
    inputs = (x, x, x) if module is LSSAttention else (x,)
    for p in (0.0, 0.1):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(module(p=p) if module is SegmentDropout else module(dropout=p), backend="eager")(*inputs)
        assert ["draw_seed" in reason for reason in counters["graph_break"]] == [True] * (p > 0)


def compare_assignments(rank: int, options: dict[str, Any]) -> int:
    """Compile once for batches of which each has its own assignment and mask; return how often it was compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LSSTransformer(CONFIG, positions="rotary", **options).model.double()
    whole = deepcopy(model)
    tokens, counter = torch.randint(11, (2, CONFIG.seq_len)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        assignment = ChunkAssignment.from_owners(torch.randperm(16, generator=generator) % 2, 2)
        ids = (torch.rand(2, CONFIG.seq_len, generator=generator) < 0.2).cumsum(1)
        mask = AttentionMask.documents(ids) & AttentionMask.causal()
        shard = SequenceShard(rank, 2, "balanced", dist.group.WORLD, assignment=assignment)
        for module in segment_modules(model):
            module.set_shard(shard)
        expected = gradients(whole, partial(whole, mask=mask), tokens)
        found = gradients(model, partial(compiled, mask=mask), shard.split(tokens))
        for x in found.values():
            dist.all_reduce(x)
        assert_equal(found, expected, 1e-10)
    return counter.frame_count


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "selective"}])
def test_a_compiled_model_serves_every_assignment_and_mask(world, options) -> None:
    assert world.run(2, compare_assignments, options, timeout=200) == [1, 1]


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile's default backend needs a C++ compiler"
)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_are_compiled_by_configuration(world, dropout) -> None:
    # with dropout random numbers are drawn outside of the graph, in the same order
    plain, compiled = (
        world.run(2, fit, Run(size=2, model={"num_layers": 1, "dropout": dropout, "compile_blocks": own}), timeout=200)[
            0
        ]
        for own in (False, True)
    )
    assert_equal(compiled, plain, 1e-5)


@pytest.mark.slow
@NEEDS_COMPILER
def test_compiled_blocks_may_be_sharded_and_validated_before(world) -> None:
    # FSDP's hooks around a block cannot be traced, and angles of a validation must not be kept for training
    strategy = {"sharding": "fsdp", "sharding_units": [Block]}  # a single block, since compiling takes the time
    models = [{"positions": "rotary", "num_layers": 1, "compile_blocks": own} for own in (False, True)]
    runs = [Run(size=2, strategy=strategy, model=model) for model in models]
    plain, compiled = (world.run(2, fit_after_validation, run, timeout=200)[0] for run in runs)
    assert_equal(compiled, plain, 1e-5)


def fit_after_validation(rank: int, run: Run) -> dict[str, Tensor]:
    module, trainer = make_module(run), make_trainer(rank, run)
    loader = make_loader(trainer, make_samples(run.samples), 4)
    trainer.validate(module, loader, verbose=False)
    assert not trainer.validate_loop.inference_mode  # room that FSDP makes in inference mode cannot be trained with
    trainer.fit(module, loader)
    return {name: x.clone() for name, x in trainer.strategy.lightning_module_state_dict().items() if x is not None}


def test_a_copy_of_a_compiled_block_is_its_own() -> None:
    block = Transformer(CONFIG).blocks[0]
    block.compile_forward(backend="eager")
    copy = deepcopy(block)
    with torch.no_grad():
        copy.mlp.out.weight.zero_()
        x = torch.randn(1, 4, CONFIG.width)
        assert not torch.equal(copy(x), block(x))
