"""Sharded parameters (FSDP): memory, checkpoints, and what users' modules do. Parity is in test_parity.py."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from lightning_lss import LSSStrategy, LSSTransformer
from lightning_lss.checkpoint.state import Owners, own_parts
from lightning_lss.parallel.fsdp import units_of
from lightning_lss.parallel.segment_local import SegmentGradScaler
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError, World
from tests.modules import OwnModule, Recorder, TransformerBuiltLate, gradient_norms
from tests.training import (
    KINDS,
    AdamTransformer,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
    sharded,
)

# -- what a rank holds -------------------------------------------------------------------------------------------------


def elements_held(rank: int, run: Run) -> dict[str, Any]:
    module, trainer = make_module(run), make_trainer(rank, run)
    during = {}

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            during["parameters"] = sum(local(x).numel() for x in pl_module.parameters())
            during["gradients"] = sum(local(x.grad).numel() for x in pl_module.parameters())

    trainer.callbacks.append(Spy())
    trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    states = trainer.optimizers[0].state.values()
    during["moments"] = sum(local(x).numel() for state in states for x in state.values() if x.dim())
    return during


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


@pytest.mark.parametrize(("kind", "shares"), [("fsdp", 4), ("hybrid", 2)])
def test_a_rank_holds_its_share(world: World, kind, shares) -> None:
    run = {"module": AdamTransformer, "model": {"positions": "rotary"}}
    whole = world.run(1, elements_held, Run(**run))[0]
    ranks = world.run(4, elements_held, Run(size=2, strategy=sharded(kind), **run))
    for name, count in whole.items():
        held = [held[name] for held in ranks]
        assert sum(held) == count * 4 // shares, name  # every element once, or once for each copy
        assert max(held) <= 1.1 * count / shares, name  # rows are not divided


def test_units_are_repeated_blocks_that_share_nothing_with_others() -> None:
    module = LSSTransformer(width=16, num_layers=3, num_heads=2)
    assert units_of(module) == list(module.model.blocks)
    module.model.blocks[0].mlp.up.weight = module.model.blocks[1].mlp.up.weight
    assert units_of(module) == [module.model.blocks[2]]
    assert units_of(module, []) == []
    assert units_of(module, [nn.LayerNorm])[-1] is module.model.norm
    assert units_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []  # layers are too small to gather alone


# -- modules as users write them ---------------------------------------------------------------------------------------


class WithScalar(OwnModule):
    """fully_shard refuses scalar parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.out.register_forward_hook(lambda module, args, output: output * self.temperature)


class CallsItself(SGDTransformer):
    """A step that calls the LightningModule twice."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self(batch["inputs"])
        return super().training_step(batch, batch_idx) + 0 * self(batch["inputs"]).sum()


class SharesABlock(SGDTransformer):
    """The same block twice, as in ALBERT."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.blocks.append(self.model.blocks[0])


class Untied(SGDTransformer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "tie_embeddings": False})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", [OwnModule, WithScalar, CallsItself, SharesABlock, Untied, TransformerBuiltLate])
def test_users_modules(world: World, module, kind) -> None:
    trainer = {"gradient_clip_val": 0.3, "precision": "64-true"}
    reference = world.run(1, fit, Run(module=module, trainer=trainer))[0]
    run = Run(size=2, module=module, trainer=trainer, strategy=sharded(kind))
    assert_equal_on_ranks(world.run(4, fit, run), reference, 1e-10)


class WithBatchNorm(OwnModule):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(11)
        self.out.register_forward_hook(lambda module, args, output: self.norm(output.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_those_of_ddp(world: World, kind) -> None:
    trainer = {"precision": "64-true"}
    plain = world.run(4, fit, Run(size=2, module=WithBatchNorm, trainer=trainer, strategy={"verify": False}))
    ours = world.run(4, fit, Run(size=2, module=WithBatchNorm, trainer=trainer, strategy=sharded(kind, verify=False)))
    for states in zip(ours, plain):
        assert_equal(*states, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_over_two_batches_in_flight(world: World, kind) -> None:
    trainer = {"precision": "64-true", "accumulate_grad_batches": 3, "gradient_clip_val": 0.3}
    reference = world.run(1, fit, Run(trainer=trainer))[0]
    run = Run(size=2, trainer=trainer, strategy=sharded(kind))
    assert_equal_on_ranks(world.run(4, fit, run), reference, 1e-10)


class Unequal(SGDTransformer):
    """Starts from other weights on every rank, as a module does that is built without a seed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += dist.get_rank()


def test_ranks_start_from_rank_zero(world: World) -> None:
    reference = world.run(1, fit, Run(module=Unequal))[0]
    assert_equal_on_ranks(world.run(4, fit, Run(size=2, module=Unequal, strategy=sharded())), reference, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_on_the_same_module(world: World, kind) -> None:
    run = {"module": Recorder, "model": {"positions": "rotary"}, "steps": 2}
    reference = world.run(1, stages, Run(**run))[0]
    for results in world.run(4, stages, Run(size=2, strategy=sharded(kind), **run)):
        assert results == pytest.approx(reference, rel=1e-4)


def stages(rank: int, run: Run) -> dict[str, float]:
    """Train with validation between steps, evaluate the same module, also before any training, and train on."""
    module, results, samples = make_module(run), {}, make_samples(8)
    batch = 8 * run.size // dist.get_world_size()
    for number in range(2):
        trainer = make_trainer(rank, run, num_sanity_val_steps=1, val_check_interval=1)
        data = make_loader(trainer, samples, batch)
        results[f"before {number}"] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        trainer.fit(module, data, make_loader(trainer, samples, batch))
        results[f"during {number}"] = trainer.callback_metrics["val/loss"].item()
        results[f"after {number}"] = trainer.test(module, data, verbose=False)[0]["test/loss"]
        predictions = trainer.predict(module, make_loader(trainer, samples, batch))
        assert predictions[0].shape == (batch, 16)
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_norm_is_that_of_the_whole_model(world: World, kind) -> None:
    reference = world.run(1, gradient_norms, Run(model={"positions": "learned"}))[0]
    for norms in world.run(4, gradient_norms, Run(size=4, strategy=sharded(kind))):
        assert norms == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precisions(world: World, precision) -> None:
    trainer = {"precision": precision, "gradient_clip_val": 0.3}
    plain = world.run(4, fit, Run(size=2, trainer=trainer))
    for states in zip(world.run(4, fit, Run(size=2, trainer=trainer, strategy=sharded())), plain):
        assert_equal(*states, 0.02)


def step_with_overflow(rank: int, overflowing: int) -> bool:
    """Whether a step was taken where one rank's part of a gradient has overflowed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    linear = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    other = nn.Parameter(torch.zeros(3))  # segment-local
    optimizer = torch.optim.SGD([*linear.parameters(), other], lr=1.0)
    scaler = SegmentGradScaler(torch.amp.GradScaler("cpu", init_scale=4.0), dist.group.WORLD)
    scaler.scale(linear(torch.ones(2, 4)).sum() + other.sum()).backward()
    if rank == overflowing:
        linear.weight.grad.to_local().fill_(torch.inf)
    before = other.detach().clone()
    scaler.unscale_(optimizer)
    if overflowing < 0:
        assert other.grad.tolist() == [1.0] * 3
        assert linear.bias.grad.full_tensor().tolist() == [2.0] * 4
    scaler.step(optimizer)
    return not torch.equal(before, other.detach())


def test_an_overflow_in_one_part_skips_the_step_everywhere(world: World) -> None:
    assert world.run(2, step_with_overflow, -1) == [True, True]
    assert world.run(2, step_with_overflow, 1) == [False, False]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_the_name_is_registered() -> None:
    strategy = StrategyRegistry.get("lss_fsdp")
    assert isinstance(strategy, LSSStrategy)
    assert strategy._parameters._sharding == "fsdp"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sharding": "zero"}, "sharding='zero' is unknown: use 'fsdp'"),
        ({"sharding": "fsdp", "find_unused_parameters": True}, "find_unused_parameters: with sharding='fsdp'"),
        ({"sharding": "hybrid", "model_averaging_period": 2}, "model_averaging_period: with sharding='hybrid'"),
        ({"save_distributed_checkpoint": True, "start_method": "spawn"}, "start_method='spawn' are incompatible"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        LSSStrategy(**arguments)


class ZeroTransformer(SGDTransformer):
    def configure_optimizers(self) -> Any:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)


class ForeachTransformer(SGDTransformer):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, foreach=True)


class MetaTransformer(SGDTransformer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.to("meta")


def refusal(rank: int, run: Run, callback: type[pl.Callback] | None) -> str:
    callbacks = [] if callback is None else [callback(swa_lrs=0.1) if "Stochastic" in callback.__name__ else callback()]
    trainer = make_trainer(rank, run, callbacks=callbacks)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    return str(caught.value)


@pytest.mark.parametrize(
    ("run", "callback", "words"),
    [
        (Run(size=2), EMAWeightAveraging, "EMAWeightAveraging keeps a copy of the whole model"),
        (Run(size=2), StochasticWeightAveraging, "StochasticWeightAveraging keeps a copy"),
        (Run(size=2, module=ForeachTransformer), None, "do not take sharded parameters and others"),
        (Run(size=2, module=MetaTransformer, model={"positions": "rotary"}), None, "on the meta device have no values"),
        (Run(size=1, strategy={"sharding": "hybrid"}), None, "Use sharding='fsdp'"),
    ],
)
def test_runs_that_cannot_be_sharded_are_refused(world: World, run, callback, words) -> None:
    run.strategy = {"sharding": "fsdp", **run.strategy}
    for message in world.run(2, refusal, run, callback):
        assert words in message


def test_zero_optimizers_are_refused(world: World) -> None:
    with pytest.raises(WorkerError, match="ZeroRedundancyOptimizer"):
        world.run(2, fit, Run(size=2, module=ZeroTransformer, strategy=sharded()))


def fit_twice(rank: int, first: Run, second: Run) -> str:
    module = make_module(first)
    make_trainer(rank, first).fit(module, make_loader(make_trainer(rank, first), make_samples(16), 4))
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer(rank, second).fit(module, make_loader(make_trainer(rank, second), make_samples(16), 4))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["hybrid", None])
def test_a_module_is_not_sharded_anew(world: World, kind) -> None:
    first, second = (Run(size=2, model={"positions": "rotary"}, strategy=sharded(kind)) for kind in ("fsdp", kind))
    for message in world.run(4, fit_twice, first, second):
        assert "sharded in another way already" in message


class Tower(nn.Module):
    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.shared = shared
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))


def test_units_are_found_within_blocks_that_share_a_weight() -> None:
    shared = nn.Parameter(torch.zeros(2))
    towers = nn.ModuleList(Tower(shared) for _ in range(2))
    assert units_of(towers) == [layer for tower in towers for layer in tower.layers]


def test_a_state_keeps_the_versions_of_modules() -> None:
    module = nn.BatchNorm1d(2)
    assert own_parts(module.state_dict(), Owners(module), ("state_dict",))._metadata[""]["version"] == module._version
