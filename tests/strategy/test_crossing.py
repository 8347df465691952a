"""Modules that cross the borders of their segments train as on one device."""

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import InexactError, LSSAttention, SegmentConv1d, sequence_shard, token_mean
from lightning_lss.nn.convolution import crosses_borders
from lightning_lss.nn.loss import IGNORED
from lightning_lss.strategy.verification import suspects
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from tests.training import Run, fit, make_loader, make_module, make_samples, make_trainer, whole_state


class Crossing(pl.LightningModule):
    """A layer of attention between an embedding and a head, with what subclasses do to the tokens."""

    def __init__(self, vocab_size: int, width: int, **_: Any) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(vocab_size, width), nn.Linear(width, 3 * width)
        self.attention, self.out = LSSAttention(), nn.Linear(width, vocab_size)
        self.build(width)

    def build(self, width: int) -> None:
        raise NotImplementedError

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def more_loss(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor | float:
        return 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.mix(self.embed(batch["inputs"]))
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attention(q, k, v).transpose(1, 2).flatten(2)
        targets = batch["targets"].flatten()
        total = F.cross_entropy(self.out(x).flatten(0, 1), targets, reduction="sum", ignore_index=IGNORED)
        return token_mean(total, (targets != IGNORED).sum()) + self.more_loss(x, batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return sequence_shard(self).gather(self.mix(self.embed(batch["inputs"])))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class ByHand(Crossing):
    """Convolutions of this package, a recurrence, pooling, the first and the last token, and labels from neighbours."""

    def build(self, width: int) -> None:
        self.wide = SegmentConv1d(width, width, 5, dilation=2)  # reaches beyond the chunks of zigzag
        self.depthwise = SegmentConv1d(width, width, 3, padding="causal", groups=width)
        self.gru = nn.GRU(width, width, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        x = x + self.depthwise(F.gelu(self.wide(x.mT))).mT
        return x + sequence_shard(self).on_whole(self.gru, x)[0]

    def more_loss(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        shard = sequence_shard(self)
        labels = shard.shift(batch["inputs"], 2, fill=IGNORED).flatten()
        total = F.cross_entropy(self.out(x).flatten(0, 1), labels, reduction="sum", ignore_index=IGNORED)
        valid = batch["targets"] != IGNORED
        pooled = shard.mean(x) + shard.first(x) * shard.last(x) + shard.first(x, valid=valid) + shard.sum(x).tanh()
        return token_mean(total, (labels != IGNORED).sum()) + F.cross_entropy(
            self.out(pooled), batch["inputs"][:, 0] * 0
        )


class OfTorch(Crossing):
    """Convolutions of torch, one of them over single positions."""

    def build(self, width: int) -> None:
        self.layers = nn.Sequential(
            nn.Conv1d(width, width, 4, padding="same"), nn.GELU(), nn.Conv1d(width, width, 3, padding=2, dilation=2)
        )
        self.pointwise = nn.Conv1d(width, width, 1)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.layers(x.mT)).mT


class Cropped(OfTorch):
    """A causal convolution as it is often written."""

    def build(self, width: int) -> None:
        super().build(width)
        self.causal = nn.Conv1d(width, width, 3, padding=2)

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + self.causal(x.mT)[..., :-2].mT


def train(rank: int, run: Run) -> dict[str, Tensor]:
    """Train and return the weights; the module is as before."""
    module, trainer = make_module(run), make_trainer(rank, run)
    seen: dict[str, Any] = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.update(state=list(pl_module.state_dict()), suspects=suspects(pl_module))

    trainer.callbacks.append(Watch())
    trainer.fit(
        module, make_loader(trainer, make_samples(run.samples), run.global_batch * run.size // trainer.world_size)
    )
    assert trainer.strategy.verification.exact
    assert seen == {"state": list(module.state_dict()), "suspects": [n for n in ("gru",) if hasattr(module, n)]}
    assert not any(crosses_borders(x) for x in module.modules() if not isinstance(x, SegmentConv1d))
    return whole_state(module)


CASES: list[tuple[type[Crossing], int, int, str, dict[str, Any]]] = [
    (ByHand, 2, 2, "zigzag", {}),
    (ByHand, 4, 4, "contiguous", {}),
    (ByHand, 4, 2, "balanced", {"sharding": "fsdp"}),
    (OfTorch, 4, 4, "zigzag", {"convert": True}),
    (OfTorch, 4, 2, "contiguous", {"convert": True, "sharding": "fsdp", "sharding_units": [nn.Conv1d]}),
    (OfTorch, 2, 2, "balanced", {"convert": True}),
    (
        OfTorch,
        2,
        2,
        "zigzag",
        {"convert": ["layers.*"], "activation_checkpointing": "full", "checkpointed_modules": ["layers"]},
    ),
    (
        OfTorch,
        2,
        2,
        "zigzag",
        {"convert": True, "activation_checkpointing": "full", "checkpointed_modules": ["layers.2"]},
    ),
]


@pytest.mark.parametrize(("module", "ranks", "size", "layout", "options"), CASES)
def test_training_is_that_of_one_device(world, module, ranks, size, layout, options) -> None:
    precise = {"precision": "64-true"}
    run = Run(size, layout, module=module, trainer=precise, strategy=options)
    expected = world.run(1, fit, Run(module=module, trainer=precise))[0]
    assert_equal_on_ranks(world.run(ranks, train, run), expected, 1e-10)


def predict(rank: int, run: Run) -> Tensor:
    """What two epochs of prediction return, the second of a run of its own."""
    module, trainer = make_module(run), make_trainer(rank, run)
    loader = make_loader(trainer, make_samples(4), 4)
    first, second = trainer.predict(module, loader), trainer.predict(module, loader)
    assert torch.equal(first[0], second[0])
    return first[0]


def test_evaluation_crosses_borders_too(world) -> None:
    precise = {"precision": "64-true"}
    (alone,) = world.run(1, predict, Run(module=OfTorch, trainer=precise))
    for found in world.run(2, predict, Run(2, module=OfTorch, trainer=precise, strategy={"convert": "layers.?"})):
        assert_equal([found], [alone], 1e-10)


def refusal(rank: int, run: Run) -> str:
    module, trainer = make_module(run), make_trainer(rank, run)
    try:
        trainer.fit(module, make_loader(trainer, make_samples(8), 2))
    except (MisconfigurationException, InexactError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("module", "convert", "words"),
    [
        (OfTorch, False, "InexactError: .*LSSStrategy.convert=True."),
        (
            Cropped,
            True,
            "Misconfig.*convert=True cannot let causal = Conv1d.*padding=2 does not keep.*padding='causal'.*convert=.'name'",
        ),
        (OfTorch, ["layers"], "Misconfig.*names a Sequential"),
        (OfTorch, ["conv"], "Misconfig.*has no submodule 'conv'"),
    ],
)
def test_what_cannot_cross_is_refused(world, module, convert, words) -> None:
    for said in world.run(2, refusal, Run(2, module=module, strategy={"convert": convert})):
        assert re.search(words, said, re.DOTALL), said
