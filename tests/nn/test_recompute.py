"""Activation checkpointing: the same gradients, fewer activations, and never the quadratic part twice with
``selective``."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from lightning_lss.attention.kernels import KERNELS
from lightning_lss.models.lightning_module import LSSTransformer
from lightning_lss.models.transformer import Transformer, TransformerConfig
from lightning_lss.nn.recompute import apply_tiles
from lightning_lss.sequence.segment import SequenceShard, segment_modules
from lightning_lss.testing.collectives import CollectiveCounter, kinds
from lightning_lss.testing.compare import assert_equal
from tests.training import Run, fit

CONFIG = TransformerConfig(vocab_size=11, seq_len=64, width=32, num_layers=3, num_heads=4)
MODES = ["none", "full", "selective", "offload"]


def make_model(**options: Any) -> tuple[Transformer, Tensor]:
    torch.manual_seed(0)
    model = LSSTransformer(CONFIG, **options).model.double()
    return model, torch.randint(11, (2, CONFIG.seq_len))


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_without(mode, tiles) -> None:
    own = gradients(*make_model(activation_checkpointing=mode, mlp_tiles=tiles))
    assert_equal(own, gradients(*make_model()), 1e-12)


def activations(model: Transformer, tokens: Tensor) -> tuple[int, int]:
    """Bytes of activations that are held between forward and backward, and at the peak."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        logits = model(tokens)
        held = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
        logits.sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return held["Activation"], peak["Activation"] + peak["Temp"]


def test_what_is_held_between_forward_and_backward() -> None:
    stream = 2 * CONFIG.seq_len * CONFIG.width * 8  # bytes of [B, L, E]
    held = {mode: activations(*make_model(activation_checkpointing=mode))[0] for mode in MODES}
    assert held["none"] > 15 * CONFIG.num_layers * stream
    assert held["full"] < (CONFIG.num_layers + 4) * stream  # a block's input each; final norm and logits
    # beside it the output of attention, and its log-sum-exp, which is a head's width smaller
    assert held["selective"] - held["full"] == CONFIG.num_layers * stream * (1 + 1 / CONFIG.head_dim)
    assert held["offload"] == held["full"]  # host memory is where a CPU model is already


def test_tiles_lower_the_peak_of_a_recomputed_block() -> None:
    whole, tiled = (
        activations(*make_model(activation_checkpointing="full", mlp_tiles=tiles, mlp_width=1024))[1]
        for tiles in (1, 4)
    )
    assert tiled < 0.6 * whole


def test_tiles_that_do_not_divide_the_sequence() -> None:
    x = torch.randn(1, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layer = nn.Linear(4, 4).double()
    whole = layer(x)
    for tiles in (3, 64):
        apply_tiles([layer], tiles)
        torch.testing.assert_close(layer(x), whole, rtol=1e-14, atol=1e-14)


def count_work(rank: int, mode: str) -> tuple[int, dict[str, int]]:
    """How often the kernel runs forward, and the collectives, in a step."""
    calls = []
    kernel = KERNELS["cpu_flash"]

    def forward(*args: Any) -> Any:
        calls.append(args)
        return kernel.forward(*args)

    KERNELS["cpu_flash"] = kernel._replace(forward=forward)
    try:
        model, tokens = make_model(activation_checkpointing=mode, positions="rotary")
        shard = SequenceShard(rank, dist.get_world_size(), "contiguous", dist.group.WORLD)
        for module in segment_modules(model):
            module.set_shard(shard)
        with CollectiveCounter() as counter:
            model(shard.split(tokens)).sum().backward()
    finally:
        KERNELS["cpu_flash"] = kernel
    return len(calls), kinds(counter.tally)


def test_selective_computes_attention_once(world) -> None:
    # rank 0 has one tile a layer, rank 1 two; a gather forward and one backward, and one more to compute again
    layers = CONFIG.num_layers
    once = {"all_gather": 2 * layers, "reduce_scatter": layers}
    for mode in ("none", "selective"):
        assert world.run(2, count_work, mode) == [(layers, once), (2 * layers, once)], mode
    twice = {**once, "all_gather": 3 * layers}
    assert world.run(2, count_work, "full") == [(2 * layers, twice), (4 * layers, twice)]


@pytest.mark.parametrize("mode", MODES[1:])
def test_dropout_draws_the_same_masks_again(world, mode) -> None:
    runs = [Run(size=2, model={"activation_checkpointing": m, "dropout": 0.5}) for m in ("none", mode)]
    expected, own = (world.run(2, fit, run)[0] for run in runs)
    assert_equal(own, expected, 1e-5)
