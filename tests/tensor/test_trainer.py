"""What a Trainer offers, for modules that are written for one device: the training of one device."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lss.nn.loss import linear_cross_entropy
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks, worst_difference
from lightning_lss.testing.world import World
from tests.tensor.models import CausalDecoder, make_batches
from tests.training import Run, make_trainer, whole_state


class Decoder(CausalDecoder):
    """Its loss in every stage."""

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("loss of evaluation", super().training_step(batch, index))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.head(self.embed(batch["tokens"]).cumsum(1))


class Manual(Decoder):
    """Two optimizers, and gradients of two backward passes that are clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            for _ in range(2):
                self.manual_backward(super().training_step(batch, index))
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = self.projections, nn.ModuleList([self.norms, self.positions, self.embed])
        return [torch.optim.SGD(part.parameters(), lr=0.3, momentum=0.9) for part in parts]


class Unfrozen(Decoder):
    """A backbone that is trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.projections

    def configure_callbacks(self) -> Any:
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([x for x in self.parameters() if x.requires_grad], lr=0.3)


class Averaged(Decoder):
    def configure_callbacks(self) -> Any:
        return [EMAWeightAveraging(decay=0.5)]


class Tiled(Decoder):
    """An MLP that can be computed in tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        logits = self.head(x + self.mlp(x))
        return super().training_step(batch, index) + F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class WithoutLogits(Decoder):
    """A loss that never holds all logits."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x, labels = self.embed(batch["tokens"]).tanh().flatten(0, 1), batch["labels"].flatten()
        loss = linear_cross_entropy(x, self.head.weight, labels) / (labels != -100).sum()
        return super().training_step(batch, index) + loss


class Dropping(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.embed.register_forward_hook(lambda module, args, output: self.dropout(output))


def train(rank: int, module: type[Decoder], run: Run) -> dict[str, Tensor]:
    """The weights after two epochs of three batches."""
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    model, trainer = module(), make_trainer(rank, run)
    trainer.fit(model, DataLoader(make_batches(16), batch_size=None))
    if run.size > 1:
        assert trainer.strategy.verification.exact  # type: ignore[attr-defined]
    return whole_state(model)


EXACT = {"precision": "64-true"}
CASES: list[tuple[type[Decoder], dict[str, Any], dict[str, Any], float]] = [
    (Decoder, {**EXACT, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, {}, 1e-10),
    (Decoder, {**EXACT, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}, 1e-10),
    (Decoder, {**EXACT, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, {"sharding": "fsdp"}, 1e-10),
    (Decoder, {**EXACT, "overfit_batches": 1}, {}, 1e-10),
    (Decoder, {**EXACT, "fast_dev_run": 2}, {}, 1e-10),
    (Manual, EXACT, {}, 1e-10),
    (Unfrozen, EXACT, {}, 1e-10),
    (Averaged, EXACT, {}, 1e-10),
    (Tiled, EXACT, {"mlp_tiles": 2}, 1e-10),
    (WithoutLogits, EXACT, {}, 1e-10),
    (Decoder, {"precision": "32-true"}, {}, 1e-5),
    (Decoder, {"precision": "bf16-mixed"}, {}, 3e-2),
    (Decoder, {"precision": "16-mixed"}, {}, 1e-2),
    (Decoder, {"precision": "bf16-true"}, {}, 3e-2),
    (Decoder, {"precision": "16-true"}, {}, 1e-2),
]


@pytest.mark.parametrize(("module", "trainer", "strategy", "bound"), CASES)
def test_training_is_that_of_one_device(world: World, module, trainer, strategy, bound) -> None:
    run = {"trainer": {"max_epochs": 2, **trainer}, "steps": -1}
    (expected,) = world.run(1, train, module, Run(**run))
    assert_equal_on_ranks(world.run(2, train, module, Run(2, "auto", strategy=strategy, **run)), expected, bound)


def all_stages(rank: int, size: int, file: str) -> dict[str, Any]:
    """What the stages log and predict, and the weights that one device loads from the checkpoint."""
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    module, data = Decoder(), DataLoader(make_batches(15), batch_size=None)
    trainer = make_trainer(
        rank, Run(size, "auto", trainer={**EXACT, "num_sanity_val_steps": 1, "val_check_interval": 1})
    )
    trainer.fit(module, data, data)
    trainer.save_checkpoint(file)
    found: dict[str, Any] = {"fit": [trainer.callback_metrics["loss of evaluation"]]}
    for stage in ("validate", "test"):
        found[stage] = [torch.tensor(x) for x in getattr(trainer, stage)(module, data, verbose=False)[0].values()]
    found["predict"] = trainer.predict(module, data)
    found["loaded"] = list(Decoder.load_from_checkpoint(file).state_dict().values())
    return found


def test_every_stage_and_the_checkpoint_are_those_of_one_device(world: World, tmp_path) -> None:
    (expected,) = world.run(1, all_stages, 1, str(tmp_path / "one.ckpt"))
    assert [len(x) for x in expected.values()][:4] == [1, 1, 1, 3]
    for found in world.run(2, all_stages, 2, str(tmp_path / "two.ckpt")):
        for stage, tensors in expected.items():
            assert_equal(found[stage], tensors, 1e-6, what=stage)  # Lightning averages what is logged in float32


def test_dropout_is_the_same_however_a_sequence_is_split_and_another_than_on_one_device(world: World) -> None:
    run: dict[str, Any] = {"trainer": EXACT, "steps": 3}
    (alone,) = world.run(1, train, Dropping, Run(**run))
    two, four = (world.run(n, train, Dropping, Run(n, x, **run)) for n, x in ((2, "zigzag"), (4, "contiguous")))
    assert_equal_on_ranks([*two[1:], *four], two[0], 1e-10)
    assert worst_difference(two[0], alone).error > 1e-3
