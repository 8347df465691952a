"""Where each bug tells its story: the traps of sequence parallelism, each with a test that fails without the cure.

Traps whose cure is a property of one module are tested beside that module: the adjoint of a gather (sequence/test_segment.py),
uneven tokens (nn/test_loss.py), the timeout of process groups (sequence/test_grid.py), two random streams
(nn/test_dropout.py).
"""

import os
import random
import threading
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_lss import ShardedModule, lss_attention, sequence_shard
from lightning_lss.callbacks import LSSThroughputMonitor
from lightning_lss.parallel.segment_local import SegmentLocal
from lightning_lss.sequence.grid import build_grid
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.testing.collectives import CollectiveCounter
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError, World
from tests.training import (
    LENGTH,
    TABLE,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    whole_state,
)


def test_gradients_of_positions_are_not_s_times_too_large(world: World) -> None:
    # Trap 1. One SGD step without momentum moves the table by the gradient, so a wrong scale shows as a wrong step.
    reference = world.run(1, fit, Run(steps=1))[0][TABLE]
    start = world.run(1, fit, Run(steps=0))[0][TABLE]
    for size in (2, 4):
        moved = world.run(size, fit, Run(size=size, steps=1))[0][TABLE] - start
        assert (moved.norm() / (reference - start).norm()).item() == pytest.approx(1, abs=1e-5)


class ManualTransformer(SGDTransformer):
    """Manual optimization with two optimizers and gradients accumulated over two backward passes of each step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        table = [self.model.positions.weight]
        others = [p for p in self.parameters() if p is not table[0]]
        return [torch.optim.SGD(others, lr=0.5), torch.optim.SGD(table, lr=0.1)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for _ in range(2):  # both backward passes synchronize, as a user who does not know better writes it
            self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2)])
def test_manual_optimization_with_two_optimizers(world, world_size, size) -> None:
    # Traps 1 and 2: dividing the accumulated gradient by S at each pass would divide the first pass twice.
    reference = world.run(1, fit, Run(module=ManualTransformer, steps=4))[0]
    assert_equal_on_ranks(
        world.run(world_size, fit, Run(module=ManualTransformer, size=size, steps=4)), reference, 1e-5
    )


def test_clipping_by_norm_keeps_shared_weights_equal(world) -> None:
    # Trap 2. Ranks whose tables have other gradients would clip by other factors.
    states = world.run(4, fit, Run(size=4, trainer={"gradient_clip_val": 0.05}))
    assert_equal_on_ranks(states[1:], states[0], 0)


class OverflowingTransformer(SGDTransformer):
    """In step 1 the table's gradient overflows on the last rank only."""

    def on_after_backward(self) -> None:
        last = sequence_shard(self).rank == sequence_shard(self).size - 1
        if self.global_step == 1 and last and not getattr(self, "overflowed", False):
            self.overflowed = True
            self.model.positions.weight.grad[0, 0] = torch.inf


def fit_with_scaler(rank: int, run: Run) -> tuple[dict[str, Tensor], float]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, trainer = make_module(run), make_trainer(rank, run, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    return trainer.strategy.lightning_module_state_dict(), trainer.precision_plugin.scaler.get_scale()


@pytest.mark.parametrize("size", [2, 4])
def test_an_overflow_on_one_rank_skips_the_step_on_all(world, size) -> None:
    # Trap 3. Half precision scales the loss up, and halves the scale and skips the step when a gradient overflows. Each
    # rank looks at its own gradients. Shared ones are averaged first, so an infinity in them reaches everyone; a row of
    # the table has its gradient on one rank only. That rank alone would skip, and from then on train other weights.
    results = world.run(size, fit_with_scaler, Run(size=size, module=OverflowingTransformer, steps=3))
    assert [scale for _, scale in results] == [512.0] * size  # halved once, on every rank
    assert_equal_on_ranks([state for state, _ in results], results[0][0], 0)


def test_targets_are_shifted_before_the_split() -> None:
    # Trap 6. In zigzag the token after the last of a chunk lies on another rank.
    sample = make_samples(1, 16)[0]
    for rank in range(4):
        shard = SequenceShard(rank, 4, "zigzag")
        inputs, targets = (shard.split(sample[key], dim=0) for key in ("inputs", "targets"))
        for local, position in enumerate(shard.positions(4).tolist()):
            assert inputs[local] == sample["inputs"][position]
            assert position == 15 or targets[local] == sample["inputs"][position + 1]


class SeenBatches(SGDTransformer):
    """Notes the tokens of each batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), batch["inputs"].clone()]
        return super().training_step(batch, batch_idx)


class NoisySamples(Dataset):
    """Samples with a random augmentation drawn in the data loader's worker process."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numpy = np.random.randint(11)  # noqa: NPY002 (the generator that Lightning seeds in workers)
        tokens = torch.tensor([random.randrange(11), numpy, *torch.randint(11, (LENGTH - 2,)).tolist()])
        return {"inputs": tokens, "targets": tokens}


def seen_batches(rank: int, run: Run, workers: int) -> Tensor:
    module = make_module(run)
    pl.seed_everything(3, workers=workers > 0, verbose=False)
    try:
        trainer = make_trainer(rank, run, use_distributed_sampler=True)
        data = NoisySamples() if workers else make_samples(16)
        context = "fork" if workers else None  # ranks in tests would have it start Python anew
        loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=context)
        trainer.fit(module, loader)
    finally:
        os.environ.pop("PL_SEED_WORKERS", None)
        os.environ.pop("PL_GLOBAL_SEED", None)
    shard = SequenceShard(rank % run.size, run.size, run.layout, trainer.strategy._grid.sequence_group)
    return shard.gather(torch.stack(module.seen), dim=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_samplers_and_worker_seeds_go_by_data_rank(world, workers) -> None:
    # Trap 7. Ranks 0 and 1 share sequences, ranks 2 and 3 share others.
    seen = world.run(4, seen_batches, Run(size=2, module=SeenBatches), workers)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


class SplitByGlobalRank(IterableDataset):
    def __iter__(self) -> Any:
        yield from make_samples(16)[dist.get_rank() :: dist.get_world_size()]


def fit_iterable(rank: int, run: Run) -> None:
    trainer = make_trainer(rank, run)
    trainer.fit(make_module(run), DataLoader(SplitByGlobalRank(), batch_size=2))


def test_different_batches_in_a_group_are_refused(world) -> None:
    with pytest.raises(WorkerError, match="IterableDataset that splits its data by global rank") as error:
        world.run(2, fit_iterable, Run(size=2))
    assert "rank 0:" in str(error.value)
    assert "rank 1:" in str(error.value)


def backward_in_another_thread(rank: int) -> None:
    # what CUDA does: there, autograd runs backward, and with it the recomputation of checkpoints, in threads of its own
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 2, 8, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    shard = SequenceShard(rank, 2, "zigzag", dist.group.WORLD)
    parts = [shard.split(x, 2).clone().requires_grad_() for x in (q, k, v)]
    out = torch.utils.checkpoint.checkpoint(lambda *x: lss_attention(*x, shard), *parts, use_reentrant=False)
    thread = threading.Thread(target=lambda: out.backward(shard.split(grad, 2)))
    thread.start()
    thread.join()
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    lss_attention(*whole).backward(grad)
    assert_equal([x.grad for x in parts], [shard.split(x.grad, 2) for x in whole], 1e-12)


def test_checkpoints_recomputed_in_another_thread(world) -> None:
    # Trap 9. A context around the step would not be seen there.
    world.run(2, backward_in_another_thread)


class TableOnTheModule(SGDTransformer, ShardedModule):
    """A LightningModule that itself has a segment-local parameter and a segment-local buffer."""

    segment_local = ("bias", "offset")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shard = SequenceShard()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))

    def on_train_start(self) -> None:
        self.offset.fill_(self.shard.rank + 1.0)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        self.steps += 1
        logits = super().forward(tokens) + self.bias * self.offset * torch.arange(11)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def bias_and_offset(rank: int, run: Run) -> tuple[float, float]:
    state = fit(rank, run)
    return state["bias"].item(), state["offset"].item()


def test_segment_local_state_directly_on_the_lightning_module(world) -> None:
    # Trap 10. DDP would average the one and overwrite the other with rank 0's.
    results = world.run(
        4, bias_and_offset, Run(size=2, module=TableOnTheModule, model={"positions": "rotary"}, steps=2)
    )
    biases, offsets = zip(*results)
    assert offsets == (1.0, 2.0, 1.0, 2.0)
    assert biases[0] == biases[2] != biases[1] == biases[3]  # averaged over the data group only


def monitored_rates(rank: int, run: Run) -> dict[str, float]:
    monitor = LSSThroughputMonitor(window_size=2)
    trainer = make_trainer(rank, run, callbacks=[monitor])
    trainer.fit(make_module(run), make_loader(trainer, make_samples(run.samples), 2))
    throughput = next(iter(monitor._throughputs.values()))
    return throughput.compute() if throughput._time else {}


def test_a_shared_sequence_counts_once(world) -> None:
    # Trap 12. Lightning multiplies what one rank saw by the world size.
    rates = world.run(4, monitored_rates, Run(size=2))[0]
    batches = rates["device/items_per_sec"] / (2 * LENGTH / 2)  # this rank holds half of two sequences
    assert rates["samples_per_sec"] == pytest.approx(batches * 2 * 2)  # two groups, two sequences each
    assert rates["tokens_per_sec"] == pytest.approx(rates["samples_per_sec"] * LENGTH)


class FailingTransformer(SGDTransformer):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 1:
            raise RuntimeError("the error that the user must see")
        return super().training_step(batch, batch_idx)


def fail_and_save(rank: int, run: Run, folder: str) -> str:
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    trainer = make_trainer(rank, run, callbacks=[OnExceptionCheckpoint(folder)], enable_checkpointing=True)
    try:
        trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(("positions", "folder"), [("learned", False), ("rotary", False), ("rotary", True)])
def test_no_collectives_on_the_way_out(world, tmp_path, positions, folder) -> None:
    # Trap 14. Saving on exception gathers the table and ends in a barrier, neither of which the other ranks join. A
    # folder is written in collectives whatever the model holds.
    strategy = {"save_distributed_checkpoint": folder}
    run = Run(size=2, module=FailingTransformer, model={"positions": positions}, strategy=strategy)
    counted = world.run(2, count_after_failure, run, str(tmp_path))
    assert counted == [("the error that the user must see", 0)] * 2


def count_after_failure(rank: int, run: Run, folder: str) -> tuple[str, int]:
    """The error that comes out and the number of collectives after it was raised."""
    mode = CollectiveCounter()
    barriers = []
    barrier = dist.barrier
    original = FailingTransformer.training_step

    def enter_and_fail(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 1:
            mode.__enter__()
            dist.barrier = lambda *args, **kwargs: barriers.append(1)
        return original(self, batch, batch_idx)

    FailingTransformer.training_step = enter_and_fail  # type: ignore[method-assign]
    try:
        message = fail_and_save(rank, run, folder)
    finally:
        FailingTransformer.training_step = original  # type: ignore[method-assign]
        dist.barrier = barrier
        mode.__exit__(None, None, None)
    return message, mode.tally.total() + len(barriers)


class SharedAndOwn(ShardedModule):
    segment_local = ("own",)

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2))


def clip_large_half_gradients(rank: int) -> float:
    module = SharedAndOwn()
    for parameter in module.parameters():
        parameter.grad = torch.full((2,), 300.0, dtype=torch.float16)
    return SegmentLocal(module, build_grid(2, rank, 2)).clip_grad_norm(module.parameters(), 1.0).item()


def test_the_norm_does_not_overflow_in_half_precision(world) -> None:
    # its square would, from 256 on, and the gradients would be clipped to nothing
    assert world.run(2, clip_large_half_gradients) == [pytest.approx((6 * 300.0**2) ** 0.5, rel=1e-3)] * 2


class WithUnused(SGDTransformer):
    """A layer that only the first ``uses`` steps use."""

    uses = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * self.extra(loss.new_ones(1)).sum() if batch_idx < self.uses else loss


class UnusedLater(WithUnused):
    uses = 1


def fit_with_unused(rank: int, run: Run) -> tuple[str, int, dict[str, Tensor]]:
    module, trainer = make_module(run), make_trainer(rank, run)
    try:
        trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    except MisconfigurationException as error:
        return str(error), trainer.global_step, {}
    return "", trainer.global_step, whole_state(module)


@pytest.mark.parametrize(("module", "steps"), [(WithUnused, 1), (UnusedLater, 2)])
def test_a_step_whose_gradients_were_not_averaged_is_refused(world, module, steps) -> None:
    # DistributedDataParallel waits for the gradient of every parameter. Without one it averages none, and says so at the next
    # step: the last step of a run was taken by each rank's own gradients, in silence.
    run = Run(size=2, module=module, steps=steps)
    for message, taken, _ in world.run(2, fit_with_unused, run):
        assert "extra.weight, extra.bias: trained, but without a gradient in this step" in message
        assert "Use LSSStrategy(find_unused_parameters=True)" in message
        assert taken == steps - 1
    reference = world.run(1, fit_with_unused, Run(module=module, steps=steps))[0][2]
    run.strategy = {"find_unused_parameters": True}
    assert_equal_on_ranks([state for *_, state in world.run(2, fit_with_unused, run)], reference, 1e-5)
