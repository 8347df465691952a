"""One traced step: what it holds, sends and computes, against sums done by hand."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lss import AttentionMask, LSSTransformer, SequenceShard
from lightning_lss.megatron import MegatronScheme
from lightning_lss.planner.fakes import resized
from lightning_lss.planner.step import Options, Rank, trace_step
from lightning_lss.planner.trace import COLLECTIVES, PARTS, WORK, Trace
from lightning_lss.testing.collectives import received_of
from tests.planner.modules import OwnModule, batch_of, pair_of, transformer


def rank_of(size: int = 2, length: int = 64, kernel: str = "cpu_flash", scheme: Any = None, **options: Any) -> Rank:
    return Rank(size, length, 1, Options(**options), kernel, scheme)


def total(trace: Trace) -> float:
    return trace.moments.sum(1).max()


def received(trace: Trace, ranks: int) -> float:
    payloads = trace.collectives[:, COLLECTIVES.index("payload")]
    return sum(received_of(str(kind), payload, ranks) for kind, payload in zip(trace.kinds, payloads))


def test_parameters_gradients_and_state_are_those_of_the_module() -> None:
    module = transformer()
    trace = trace_step(module, batch_of(), rank_of())
    size = sum(x.nbytes for x in module.parameters())
    most = dict(zip(PARTS, trace.moments.max(0)))
    assert most["parameters"] == size
    assert most["gradients"] == size
    assert 2 * size <= most["optimizer"] < 2.5 * size  # AdamW's two moments, steps, and temporaries of one parameter
    assert trace.parameters[0] == size


def test_a_users_own_module_is_traced_and_left_as_it_is() -> None:
    module = OwnModule()
    before = {name: (x.shape, x.dtype) for name, x in module.state_dict().items()}
    trace = trace_step(module, pair_of(), rank_of(size=4, length=256))
    table = 256 // 4 * 32 * 4
    assert trace.parameters[1] == table
    assert trace.moments.max(0)[0] == sum(x.nbytes for x in module.parameters()) - 64 * 32 * 4 + table
    assert {name: (x.shape, x.dtype) for name, x in module.state_dict().items()} == before
    assert module._trainer is None
    assert not torch.distributed.is_initialized()


def test_no_memory_is_taken_for_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = LSSTransformer(width=8192, num_layers=4, num_heads=64, positions="rotary", mlp_width=65536)
    trace = trace_step(module, batch_of(), rank_of(length=2**20))
    assert total(trace) > 1e12


def test_the_hook_for_tracebacks_is_left_alone() -> None:
    before = sys.excepthook
    trace_step(transformer(), batch_of(), rank_of())
    assert sys.excepthook is before


@pytest.mark.parametrize(("kv_heads", "kept", "fraction"), [(4, True, 0.5), (2, True, 0.25), (4, False, 0.75)])
def test_bytes_of_a_layer_against_megatron(kv_heads, kept, fraction) -> None:
    module = transformer(num_kv_heads=kv_heads, keep_gathered=kept, num_layers=1)
    lss, megatron = (
        received(trace_step(module, batch_of(), rank_of(2, scheme=scheme)), 2) for scheme in (None, MegatronScheme())
    )
    whole_weights = 2 * sum(x.nbytes for x in [*module.model.norm.parameters(), module.model.embedding.weight]) / 2
    norms = 2 * sum(x.nbytes for x in module.model.blocks[0].attention_norm.parameters()) * 2 / 2
    assert lss / (megatron - whole_weights - norms) == fraction


@pytest.mark.parametrize("kernel", ["cpu_flash", "cuda_flash", "efficient"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_attention_of_the_busiest_rank(layout, kernel) -> None:
    module = transformer(num_layers=1)
    trace = trace_step(module, batch_of(), rank_of(4, 4096, kernel, layout=layout))
    pairs = max(AttentionMask.causal().plan(4096, SequenceShard(rank, 4, layout)).pairs for rank in range(4))
    assert trace.work[:, 1].tolist() == [4 * 64 * pairs, 8 * 64 * pairs, 0]


def test_a_layout_that_each_batch_has_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="Plan with layout='zigzag'"):
        rank_of(2, layout="balanced")


def test_matrix_multiplications() -> None:
    module = transformer()
    whole, split = (trace_step(module, batch_of(), rank_of(size)) for size in (1, 2))
    weights = sum(x.weight.numel() for x in module.modules() if isinstance(x, nn.Linear))
    assert whole.work[:2, 0].tolist() == [2 * 64 * weights, 4 * 64 * weights]
    assert split.work[:2, 0].tolist() == [64 * weights, 2 * 64 * weights]


def test_recomputation_is_work_of_the_backward_pass() -> None:
    plain, full = (
        trace_step(transformer(width=256), batch_of(), rank_of(2, 4096, activation_checkpointing=how))
        for how in (None, "full")
    )
    assert full.work[0, 0] == plain.work[0, 0]
    assert full.work[1, 0] > plain.work[1, 0]
    assert total(full) < total(plain)


def test_gathers_that_work_can_hide() -> None:
    trace = trace_step(transformer(num_layers=1, head_chunks=4), batch_of(), rank_of(2, kernel="cuda_flash"))
    gathers = trace.collectives[(trace.kinds == "all_gather") & (trace.collectives[:, -1] == 0)]
    behind = gathers[:, COLLECTIVES.index("attention")]
    assert len(gathers) == 4
    assert behind[0] == 0  # nothing comes before the first
    assert (behind[1:] == trace.work[0, 1] / 4).all()  # a chunk's attention while the next arrives


def test_precision() -> None:
    traces = {
        name: trace_step(transformer(), batch_of(), rank_of(2, precision=name)) for name in ("32-true", "bf16-true")
    }
    assert traces["bf16-true"].parameters[0] == traces["32-true"].parameters[0] / 2
    mixed = trace_step(transformer(), batch_of(), rank_of(2, 4096, precision="bf16-mixed"))
    assert mixed.parameters[0] == traces["32-true"].parameters[0]
    assert total(mixed) < total(trace_step(transformer(), batch_of(), rank_of(2, 4096)))


def test_what_is_sent_in_bfloat16() -> None:
    module = transformer(num_layers=1)
    whole, half = (
        received(trace_step(module, batch_of(), rank_of(2, communication_dtype=dtype)), 2)
        for dtype in (None, "bfloat16")
    )
    assert half == whole / 2


def test_offloaded_inputs_are_not_on_the_device() -> None:
    module, inputs = transformer(width=256, num_layers=6), 6 * 2048 * 256 * 4
    full, offload = (
        trace_step(module, batch_of(), rank_of(2, 4096, "cuda_flash", activation_checkpointing=how))
        for how in ("full", "offload")
    )
    highest = [trace.moments[trace.stages == 0].sum(1).max() for trace in (full, offload)]
    assert 0.8 * inputs < highest[0] - highest[1] <= inputs


def test_batches_of_any_nesting_are_resized() -> None:
    batch = {"tokens": torch.zeros(2, 8), "pixels": [torch.zeros(2, 3, 8)], "label": torch.zeros(2), "n": 3}
    new = resized(batch, 32, 5, {"pixels": 2})
    assert new["tokens"].shape == (5, 32)
    assert new["pixels"][0].shape == (5, 3, 32)
    assert new["label"].shape == (5,)
    assert new["n"] == 3


class Own(OwnModule):
    """Splits its batch itself."""

    def shard_batch(self, batch: Any, shard: Any) -> Any:
        return tuple(shard.split(x) for x in batch)


def test_a_module_that_splits_its_batch() -> None:
    assert total(trace_step(Own(), pair_of(), rank_of(2))) == total(trace_step(OwnModule(), pair_of(), rank_of(2)))


class AsksForNumbers(OwnModule):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx)["loss"] * batch[0].max().item()}


class AsksTheTrainer(OwnModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.trainer.fit_loop.max_epochs)


class ReturnsNothing(OwnModule):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return None


class Manual(OwnModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (AsksForNumbers, "AsksForNumbers asks for the value of a tensor"),
        (AsksTheTrainer, "has no 'fit_loop'"),
        (ReturnsNothing, "training_step must return a loss"),
        (Manual, "automatic_optimization=False"),
    ],
)
def test_what_cannot_be_traced_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_step(build(), pair_of(), rank_of())
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
        ({"sharding": "zero"}, "sharding='zero' is unknown"),
        ({"layout": "spiral"}, "layout='spiral' is unknown"),
        ({"communication_dtype": "int8"}, "communication_dtype='int8'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be a positive integer"),
        ({"mlp_tiles": 0}, "mlp_tiles=0 must be a positive integer"),
        ({"activation_checkpointing": "half"}, "activation_checkpointing='half' is unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize("kernel", ["cpu_flash", "cuda_flash"])
def test_masks_for_any_length(kernel) -> None:
    module, window = transformer(num_layers=1, positions="rotary"), AttentionMask.sliding_window(100)
    counted = []
    for batch in (batch_of(), {**batch_of(), "mask": window}):
        counted.append(trace_step(module, batch, rank_of(2, 4096, kernel)).work[0, 1])
    pairs = [mask.plan(4096, SequenceShard(0, 2)).pairs for mask in (AttentionMask.causal(), window)]
    assert counted[0] == 4 * 64 * pairs[0]
    assert pairs[1] <= counted[1] / (4 * 64) < 3 * pairs[1]  # a kernel without windows computes some of what is hidden


def test_masks_for_one_length_are_refused() -> None:
    mask = AttentionMask.documents(torch.zeros(1, 4096, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"The mask mask of the batch is for sequences of one length.* AttentionMask.causal\(\)"
    ):
        trace_step(transformer(num_layers=1), {**batch_of(), "mask": mask}, rank_of(2))


def test_segments_of_one_call_are_counted_one_by_one() -> None:
    module = transformer(width=128)
    traced = [
        trace_step(module, {**batch_of(1024), "mask": mask}, rank_of(1, 1024, "cuda_flash")).work
        for mask in (AttentionMask.chunked(100) & AttentionMask.causal(), AttentionMask.causal())
    ]
    chunked, whole = (work[:, WORK.index("attention")].sum() for work in traced)
    assert chunked / whole == pytest.approx((10 * 100 * 101 + 24 * 25) / (1024 * 1025))
    kernels = [work[:, WORK.index("kernels")].sum() for work in traced]
    assert kernels[0] == kernels[1]
