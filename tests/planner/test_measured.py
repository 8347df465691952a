"""What the planner predicts against what is counted: memory under torch's tracker, bytes in the collectives of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from lightning_lss.models.transformer import TransformerConfig
from lightning_lss.parallel.segment_local import count_parameters
from lightning_lss.planner import Options, Setup, rank_memory, step_traffic
from lightning_lss.planner.measure import make_model, make_step, measure_memory
from lightning_lss.planner.parameters import count
from lightning_lss.testing.collectives import CollectiveCounter
from lightning_lss.testing.fake_world import fake_world

BARE = Options(ddp=False)


def setup_of(size: int, length: int, options: Options = BARE, **sizes: Any) -> Setup:
    small = {"width": 64, "num_layers": 2, "num_heads": 4, "positions": "rotary"}
    return Setup(TransformerConfig(**{**small, **sizes}), "lss", 1, size, length, options=options)


MEASURED = {
    "whole sequence": setup_of(1, 2048),
    "zigzag": setup_of(4, 4096),
    "a rank of many": setup_of(64, 8192),
    "contiguous": setup_of(4, 4096, replace(BARE, layout="contiguous")),
    "chunks of heads": setup_of(4, 16384, replace(BARE, head_chunks=4)),
    "kept": setup_of(4, 4096, keep_gathered=True),
    "selective, kept": setup_of(8, 8192, keep_gathered=True, activation_checkpointing="selective"),
    "encoder": setup_of(4, 4096, causal=False),
    "grouped heads, swiglu": setup_of(4, 4096, num_kv_heads=1, mlp="swiglu"),
    "logits": setup_of(4, 4096, vocab_size=8192),
    "untied, float64": setup_of(2, 2048, replace(BARE, precision="64-true"), tie_embeddings=False),
    "bfloat16": setup_of(4, 4096, replace(BARE, precision="bf16-true")),
    "travels in bfloat16": setup_of(8, 8192, replace(BARE, communication_dtype="bfloat16")),
    "batches that add up": setup_of(4, 2048, replace(BARE, accumulate_grad_batches=2), width=256, num_layers=4),
    "autocast": setup_of(4, 4096, replace(BARE, precision="bf16-mixed")),
}


@pytest.mark.parametrize("name", MEASURED)
def test_memory_of_a_rank_is_within_a_tenth_of_what_torch_tracks(name) -> None:
    setup = MEASURED[name]
    with fake_world(setup.size // 2, setup.size) as group:
        measured = measure_memory(setup, group, fake_tensors=True)
    assert rank_memory(setup).total == pytest.approx(measured["Total"], rel=0.1)


def tracked(rank: int, setup: Setup) -> int:
    return measure_memory(setup, dist.group.WORLD)["Total"]


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("model", [{"positions": "learned"}, {"dropout": 0.1}, {"width": 256, "vocab_size": 1024}])
def test_memory_of_real_ranks(world, model, view) -> None:
    setup = setup_of(2, 2048, Options(gradient_as_bucket_view=view), **model)
    for measured in world.run(2, tracked, setup):
        assert rank_memory(setup).total == pytest.approx(measured, rel=0.1)


def test_the_optimizers_state_is_counted() -> None:
    setup = setup_of(2, 16, width=256)  # so short that the optimizer's step is the peak
    with fake_world(0, 2) as group:
        measured = measure_memory(setup, group, fake_tensors=True)
    memory = rank_memory(setup)
    assert memory.moment == "denominators"
    assert memory.parameters == measured["Parameter"]
    assert memory.total == pytest.approx(measured["Total"], rel=0.1)


@pytest.mark.parametrize(
    "sizes", [{}, {"mlp": "swiglu", "num_kv_heads": 2}, {"positions": "learned", "tie_embeddings": False}]
)
def test_parameters_are_those_of_the_model(sizes) -> None:
    setup = setup_of(4, 1024, **sizes)
    with fake_world(1, 4) as group:
        model = make_model(setup, group)
    assert count(setup).total == count_parameters(model)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        measure_memory(replace(setup_of(2, 128), scheme="megatron"), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fake_tensors needs"):
        measure_memory(setup_of(2, 128, dropout=0.1), None, fake_tensors=True)  # type: ignore[arg-type]


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"keep_gathered": True}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("chunks", [None, 2])
def test_bytes_of_attention_are_those_that_travel(sizes, chunks) -> None:
    if chunks == 2 and "keep_gathered" in sizes:
        chunks = 1  # all that it can have
    setup = setup_of(4, 1024, replace(BARE, head_chunks=chunks), **sizes)
    with fake_world(1, 4) as group:
        model = make_model(setup, group)
        with CollectiveCounter() as counter:
            make_step(model, setup)()
    for name, kind in (("gather", "all_gather"), ("scatter", "reduce_scatter")):
        predicted = [traffic for traffic in step_traffic(setup) if traffic.name.startswith(name)]
        counted = {x: number for x, number in counter.tally.items() if x.kind == kind}
        assert sum(traffic.calls for traffic in predicted) == sum(counted.values())
        assert sum(traffic.received for traffic in predicted) == sum(x.received * n for x, n in counted.items())
