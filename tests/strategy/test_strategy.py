"""The strategy's names, duties and refusals; whole runs of the Trainer inside test ranks."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lss import LSSStrategy, SequenceShard, sequence_shard
from lightning_lss.testing.collectives import CollectiveCounter
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError, World
from tests.modules import Recorder, TransformerBuiltLate, gradient_norms
from tests.training import (
    LENGTH,
    Run,
    SGDTransformer,
    fit,
    make_loader,
    make_module,
    make_samples,
    make_trainer,
)


@pytest.mark.parametrize(
    ("name", "start_method"),
    [("lss", "popen"), ("lss_spawn", "spawn"), ("lss_fork", "fork"), ("lss_notebook", "fork")],
)
def test_names_are_registered(name, start_method) -> None:
    assert isinstance(StrategyRegistry.get(name), LSSStrategy)
    assert StrategyRegistry.get(name)._start_method == start_method
    unused = StrategyRegistry.get(f"{name}_find_unused_parameters_true")
    assert unused._ddp_kwargs == {"find_unused_parameters": True}
    assert isinstance(StrategyRegistry.get("ddp"), pl.strategies.DDPStrategy)
    assert not isinstance(StrategyRegistry.get("ddp"), LSSStrategy)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False, enable_checkpointing=False)
    assert trainer.strategy.launcher.is_interactive_compatible == (start_method == "fork")  # in a notebook


def test_data_ranks_are_known_before_the_process_group(monkeypatch) -> None:
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        trainer = pl.Trainer(
            accelerator="cpu", devices=4, strategy=LSSStrategy(2), logger=False, enable_checkpointing=False
        )
        assert trainer.strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": rank // 2}
        assert (trainer.strategy.data_parallel_size, trainer.strategy.sequence_parallel_size) == (2, 2)
        assert trainer.strategy.sequence_shard == SequenceShard(rank % 2, 2, "zigzag")


@pytest.mark.parametrize("size", [3, 8])
def test_a_size_that_does_not_divide_the_world_is_refused_by_the_trainer(size) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"sequence_parallel_size={size} does not divide the world size 4"
    ):
        pl.Trainer(accelerator="cpu", devices=4, strategy=LSSStrategy(size), logger=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layout": "spiral"}, "layout='spiral' is unknown"),
        ({"sequence_parallel_size": 0}, "must be 'auto' or a positive integer"),
        ({"sequence_parallel_size": "two"}, "must be 'auto' or a positive integer"),
        ({"communication_dtype": "int8"}, "communication_dtype='int8' must be 'bfloat16' or 'float16'"),
        ({"communication_dtype": torch.bfloat16, "ddp_comm_hook": print}, "both say how gradients are sent"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        LSSStrategy(**arguments)


def test_float16_on_the_network_needs_a_gradient_scaler(world) -> None:
    with pytest.raises(AssertionError, match="rounds gradients of a mean over many tokens to 0"):
        world.run(2, fit, Run(size=2, strategy={"communication_dtype": "float16"}))


class TakesIterator(SGDTransformer):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        raise AssertionError("never reached")


def fit_counting_collectives(rank: int, run: Run, length: int) -> tuple[str, int]:
    """The error that a run ends with, and how many collectives there were before it."""
    module, trainer = make_module(run), make_trainer(rank, run)
    samples = make_samples(8, length)
    with CollectiveCounter() as counter:
        try:
            trainer.fit(module, make_loader(trainer, samples, 2))
        except Exception as error:
            return f"{type(error).__name__}: {error}", counter.tally.total()
    return "nothing was raised", 0


@pytest.mark.parametrize(
    ("run", "length", "words"),
    [
        (Run(size=2, module=TakesIterator), LENGTH, "takes `dataloader_iter`.* Take `batch` instead"),
        (
            Run(size=2, model={"seq_len": 18}),
            18,
            r"num_positions=18\) cannot be divided evenly among sequence_parallel_size=2.* or use RotaryEmbedding",
        ),
    ],
)
def test_modules_that_cannot_be_split_are_refused_before_any_collective(world, run, length, words) -> None:
    for message, collectives in world.run(2, fit_counting_collectives, run, length):
        assert collectives == 0
        assert message.startswith("MisconfigurationException")
        assert re.search(words, message)


@pytest.mark.parametrize(
    ("length", "layout", "words"),
    [
        (15, "contiguous", "length 15 cannot be split over 2 ranks"),
        (18, "zigzag", "not divisible by 4 .twice the sequence-parallel size"),
        (18, "zigzag", "or layout='contiguous'"),
        (18, "auto", "not divisible by 4 .twice the sequence-parallel size"),
    ],
)
def test_lengths_that_cannot_be_split_are_refused_on_every_rank(world, length, layout, words) -> None:
    run = Run(size=2, layout=layout, model={"positions": "rotary", "seq_len": length})
    for message, _ in world.run(2, fit_counting_collectives, run, length):
        assert message.startswith("ValueError: Batch entry inputs (2,")
        assert re.search(words, message)


def all_stages(rank: int, run: Run) -> dict[str, Any]:
    samples = make_samples(8)
    module = make_module(run)
    trainer = make_trainer(rank, run, num_sanity_val_steps=1, limit_val_batches=2, val_check_interval=1)
    data = make_loader(trainer, samples, 2)
    trainer.fit(module, data, make_loader(trainer, samples, 2))
    results = {"fit": trainer.callback_metrics["val/loss"].item()}
    for stage in ("validate", "test"):
        results |= {f"{stage} {k}": v for k, v in getattr(trainer, stage)(module, data, verbose=False)[0].items()}
    results["predict"] = trainer.predict(module, DataLoader(samples, batch_size=2))
    results["after"] = module(samples[0]["inputs"][None]).detach()  # out of a run the module takes whole sequences
    assert sequence_shard(module).size == 1
    assert getattr(trainer.strategy, "sequence_shard", SequenceShard()).size == run.size
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_fit_validate_test_and_predict_agree_with_one_process(world, size) -> None:
    run = {"module": Recorder, "model": {"positions": "rotary"}, "steps": 2}
    reference = world.run(1, all_stages, Run(**run))[0]
    for results in world.run(size, all_stages, Run(size=size, **run)):
        assert results.keys() == reference.keys()
        assert_equal([results["after"]], [reference["after"]], 1e-4)
        for key, value in reference.items():
            if key == "predict":
                assert_equal(results[key], value, 0)
            elif key != "after":
                assert results[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"])
def test_precisions(world, precision) -> None:
    # bfloat16 keeps 8 bits, so one step in it agrees to a few thousandths
    bound = {"64-true": 1e-10, "16-mixed": 5e-3, "16-true": 5e-3}.get(precision, 3e-2)
    reference = world.run(1, fit, Run(steps=1, trainer={"precision": precision}))[0]
    assert_equal_on_ranks(world.run(2, fit, Run(size=2, steps=1, trainer={"precision": precision})), reference, bound)


@pytest.mark.parametrize("trainer", [{"overfit_batches": 2, "max_epochs": 2}, {"fast_dev_run": 2}])
def test_trainer_modes(world, trainer) -> None:
    reference = world.run(1, fit, Run(trainer=trainer))[0]
    assert_equal_on_ranks(world.run(2, fit, Run(size=2, trainer=trainer)), reference, 1e-5)


class SplitsItself(SGDTransformer):
    def shard_batch(self, batch: dict[str, Tensor], shard: Any) -> dict[str, Tensor]:
        self.was_asked = True
        return {key: shard.split(value) for key, value in batch.items() if key != "label"}


def fit_with_labels(rank: int, run: Run) -> dict[str, Tensor]:
    samples = [{**sample, "label": torch.zeros(3)} for sample in make_samples(16)]
    module, trainer = make_module(run), make_trainer(rank, run)
    trainer.fit(module, make_loader(trainer, samples, 4))
    return trainer.strategy.lightning_module_state_dict()


@pytest.mark.parametrize("more", [{"module": SplitsItself}, {"strategy": {"sequence_dims": {"label": None}}}])
def test_batches_with_entries_that_are_not_sequences(world, more) -> None:
    reference = world.run(1, fit_with_labels, Run())[0]
    assert_equal_on_ranks(world.run(2, fit_with_labels, Run(size=2, **more)), reference, 1e-5)
    with pytest.raises(WorkerError, match=r"disagree on the sequence length.*label \(4, 3\)"):
        world.run(2, fit_with_labels, Run(size=2))


def test_gradient_norm_is_that_of_the_whole_model(world) -> None:
    reference = world.run(1, gradient_norms, Run())[0]
    for norms in world.run(4, gradient_norms, Run(size=4)):
        assert norms == pytest.approx(reference, rel=1e-4)


class TransformerBuiltInSetup(TransformerBuiltLate):
    def setup(self, stage: str) -> None:
        self.build()

    def configure_model(self) -> None:
        pass


@pytest.mark.parametrize("module", [TransformerBuiltLate, TransformerBuiltInSetup])
def test_modules_made_late_get_their_shard(world: World, module) -> None:
    reference = world.run(1, fit, Run(module=module))[0]
    assert_equal_on_ranks(world.run(2, fit, Run(size=2, module=module)), reference, 1e-5)


class BatchNormed(SGDTransformer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_norm = torch.nn.BatchNorm1d(4)


def warnings_of_fit(rank: int, run: Run) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(rank, run)
        trainer.fit(make_module(run), make_loader(trainer, make_samples(16), 4))
    return [str(warning.message) for warning in caught]


def test_batch_norm_over_a_segment_is_warned_of(world) -> None:
    run = Run(size=2, module=BatchNormed, strategy={"find_unused_parameters": True, "verify": False})
    messages = world.run(2, warnings_of_fit, run)[0]
    assert any("Batch normalization (batch_norm)" in message for message in messages)


class CheckpointedTransformer(SGDTransformer):
    """Recomputes every block in backward."""

    use_reentrant = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for block in self.model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=self.use_reentrant)


class ReentrantTransformer(CheckpointedTransformer):
    use_reentrant = True


@pytest.mark.parametrize("module", [CheckpointedTransformer, ReentrantTransformer])
def test_activation_checkpointing(world, module) -> None:
    reference = world.run(1, fit, Run())[0]
    assert_equal_on_ranks(world.run(2, fit, Run(size=2, module=module)), reference, 1e-5)


def fit_compiled(rank: int, run: Run) -> dict[str, Tensor]:
    trainer = make_trainer(rank, run)
    module = torch.compile(make_module(run), backend="eager")
    trainer.fit(module, make_loader(trainer, make_samples(16), 4))
    return trainer.strategy.lightning_module_state_dict()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_compiled_module(world, positions) -> None:
    run = {"model": {"positions": positions}}
    reference = world.run(1, fit, Run(samples=16, **run))[0]
    assert_equal_on_ranks(world.run(2, fit_compiled, Run(size=2, **run), timeout=120), reference, 1e-5)


class CutAtBorders(SGDTransformer):
    """Attention that stays within a segment, as if each were a sequence of its own."""

    def on_fit_start(self) -> None:
        for block in self.model.blocks:
            block.attention.attention.set_shard(SequenceShard())


def fit_recall(rank: int, run: Run) -> float:
    from lightning_lss.data import RecallDataModule

    run.trainer["gradient_clip_val"] = 1.0
    trainer = make_trainer(rank, run, limit_val_batches=4, num_sanity_val_steps=0, use_distributed_sampler=True)
    module = make_module(run)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2)
    data = RecallDataModule(seq_len=16, batch_size=32, vocab_size=8, train_samples=32 * run.steps)
    trainer.fit(module, datamodule=data)
    return trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]


def test_recall_is_learned_across_segments_and_only_there(world) -> None:
    model = {"vocab_size": 8, "seq_len": 16, "width": 32, "positions": "learned"}
    learned = world.run(2, fit_recall, Run(size=2, layout="contiguous", model=model, steps=130), timeout=200)
    assert all(loss < 0.1 for loss in learned)
    unproved = {"verify": False}  # on purpose not the training of one device
    cut = Run(size=2, layout="contiguous", model=model, steps=130, module=CutAtBorders, strategy=unproved)
    assert all(loss > 1.8 for loss in world.run(2, fit_recall, cut, timeout=200))  # ln 8 = 2.08 is chance


@pytest.mark.slow
def test_pytorch_lightning_is_refused(tmp_path) -> None:
    script = tmp_path / "other.py"
    script.write_text(
        "import pytorch_lightning as pl, lightning_lss, lightning as L\n"
        "for strategy in ('lss', lightning_lss.LSSStrategy()):\n"
        "    try:\n"
        "        pl.Trainer(strategy=strategy, accelerator='cpu', devices=2)\n"
        "    except Exception as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    by_name, by_object = process.stdout.splitlines()
    assert "lightning_lss works with `lightning`" in by_name
    assert "for lightning.pytorch.Trainer" in by_object
    assert "do not mix" in process.stderr
