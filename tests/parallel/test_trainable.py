"""Parameters that are frozen, unfrozen, added or removed during a run: the training of one device, or a refusal."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import LSSAttention, RotaryEmbedding, SegmentPositionalEmbedding, token_mean
from lightning_lss.strategy.validation import check_optimizers, check_renewal
from lightning_lss.testing.compare import assert_equal_on_ranks, worst_difference
from lightning_lss.testing.world import WorkerError, World
from tests.training import LENGTH, Run, epochs, fit, make_loader, make_module, make_samples, make_trainer


class Body(nn.Module):
    """Embedding, learned positions and attention."""

    def __init__(self, vocab_size: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding, self.positions = nn.Embedding(vocab_size, width), SegmentPositionalEmbedding(LENGTH, width)
        self.qkv, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width)
        self.rotary, self.attention = RotaryEmbedding(width // heads), LSSAttention(causal=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(tokens.size(1))
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.attention(self.rotary(q), self.rotary(k), v).transpose(1, 2).flatten(2)


class Tuned(pl.LightningModule):
    """A backbone, a scale directly on the module, and a head; what is trained changes in subclasses."""

    def __init__(self, vocab_size: int, width: int, num_heads: int, **_: Any) -> None:
        super().__init__()
        self.backbone = Body(vocab_size, width, num_heads)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(width, vocab_size)

    def features(self, tokens: Tensor) -> Tensor:
        return self.backbone(tokens) * self.scale

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        targets = batch["targets"].flatten()
        logits = self.head(self.features(batch["inputs"])).flatten(0, 1)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return token_mean(loss, (targets >= 0).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([x for x in self.parameters() if x.requires_grad], lr=0.5, momentum=0.9)

    def freeze_all_but(self, *parts: nn.Module | nn.Parameter) -> None:
        self.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)


class WithFinetuning(Tuned):
    """Lightning's own callback; the backbone has positions, too, which are trained from the second epoch on."""

    def configure_callbacks(self) -> Any:
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)]


class Without(nn.Module):
    def forward(self, length: int) -> float:
        return 0.0


class WithFinetuningOfShards(WithFinetuning):
    """Nothing that stays whole beside sharded parameters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone.positions = Without()  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.ones(1))


class TableLater(Tuned):
    """Positions and a scalar that are frozen in the first epoch, and one weight that is frozen in the second."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone.positions.requires_grad_(False)
        self.scale.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.positions.requires_grad_(True)
            self.scale.requires_grad_(True)
            self.backbone.norm.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        table = [self.backbone.positions.weight]
        others = [x for x in self.parameters() if x is not table[0]]
        return torch.optim.SGD([{"params": others}, {"params": table, "lr": 0.1}], lr=0.5, momentum=0.9)


class AdamTableLater(TableLater):
    """A large eps keeps tiny gradients from being blown up to a step."""

    def configure_optimizers(self) -> Any:
        table, rest = [self.backbone.positions.weight], [self.backbone.embedding.weight]
        others = [x for x in self.parameters() if x is not table[0] and x is not rest[0]]
        groups = [{"params": others}, {"params": table, "lr": 0.01}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.05, eps=1e-2)


class SomeLayers(Tuned):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.freeze_all_but(self.backbone.qkv, self.head.bias)


class OnlyPositions(Tuned):
    """Nothing is left for DistributedDataParallel to average."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.freeze_all_but(self.backbone.positions)


class Adapter(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(inner.in_features, 2, bias=False), nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Adapted(Tuned):
    """Adapters on a frozen model."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requires_grad_(False)
        self.add(self.backbone, "qkv")

    def add(self, owner: nn.Module, name: str) -> Adapter:
        adapter = Adapter(getattr(owner, name)).to(self.dtype)
        setattr(owner, name, adapter)
        return adapter


class AdaptedLater(Adapted):
    """A second adapter, and positions with attention of their own, are added for the second epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.extra: nn.Module | None = None

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            torch.manual_seed(3 + self.global_rank)  # the ranks take the values of the first
            adapter = self.add(self, "head")
            self.extra = Body(11, 16, 4).to(self.dtype)
            added = [adapter.down.weight, adapter.up.weight, *self.extra.parameters()]
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": added, "lr": 0.1})  # type: ignore[union-attr]

    def features(self, tokens: Tensor) -> Tensor:
        features = super().features(tokens)
        return features if self.extra is None else features + self.extra(tokens)


class InTheMidst(TableLater):
    """Freezes and unfreezes between two batches whose gradients are accumulated."""

    def on_train_epoch_start(self) -> None:
        pass

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.backbone.qkv.requires_grad_(False)
            self.backbone.positions.requires_grad_(True)
        if batch_idx == 3:
            self.backbone.qkv.requires_grad_(True)
            self.backbone.positions.requires_grad_(False)
            self.scale.requires_grad_(True)


class FrozenInTheMidst(Tuned):
    """The gradient of a batch is stepped by, though its parameter is frozen in the next of the accumulation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.backbone.qkv.requires_grad_(batch_idx != 1)
        self.backbone.positions.requires_grad_(batch_idx != 3)


class ByHand(TableLater):
    """Manual optimization with two optimizers in turn, and steps after two batches."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = self.backbone.parameters(), [*self.head.parameters(), self.scale]
        return [torch.optim.SGD(part, lr=0.5, momentum=0.9) for part in parts]


class ByHandAlone(TableLater):
    """Manual optimization with one optimizer, which steps by whatever has a gradient."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        if batch_idx == 2:  # for the next; modules hold whole parameters here, beside the sharded ones of optimizers
            self.head.bias.requires_grad_(self.current_epoch == 1)


FSDP = {"sharding": "fsdp", "sharding_units": [nn.Linear]}  # norm, embedding and scalars belong to the root
UNUSED = {"find_unused_parameters": True}
CASES: list[tuple[type[Tuned], int, int, dict[str, Any]]] = [
    (WithFinetuning, 1, 2, {}),
    (WithFinetuning, 2, 2, {"gradient_as_bucket_view": True}),
    (WithFinetuning, 2, 4, {}),
    (WithFinetuningOfShards, 2, 2, FSDP),
    (TableLater, 1, 2, {}),
    (TableLater, 2, 4, {"find_unused_parameters": True}),
    (TableLater, 1, 2, {"static_graph": True}),
    (TableLater, 1, 2, FSDP),
    (TableLater, 2, 4, {"sharding": "hybrid"}),
    (AdamTableLater, 1, 2, {}),
    (AdamTableLater, 1, 4, FSDP),
    (SomeLayers, 2, 2, {}),
    (SomeLayers, 1, 2, FSDP),
    (OnlyPositions, 2, 4, {}),
    (OnlyPositions, 1, 2, FSDP),
    (Adapted, 1, 2, {}),
    (Adapted, 2, 2, FSDP),
    (AdaptedLater, 1, 2, {}),
    (AdaptedLater, 2, 4, {}),
    (InTheMidst, 2, 2, {}),
    (InTheMidst, 2, 4, {"gradient_as_bucket_view": True}),
    (InTheMidst, 2, 4, UNUSED),
    (InTheMidst, 2, 4, FSDP),
    (FrozenInTheMidst, 2, 4, {}),
    (FrozenInTheMidst, 2, 4, UNUSED),
    (FrozenInTheMidst, 2, 4, FSDP),
    (ByHand, 1, 2, UNUSED),
    (ByHand, 1, 4, {"sharding": "fsdp"}),
    (ByHandAlone, 1, 2, {}),
    (ByHandAlone, 1, 2, {"static_graph": True}),
    (ByHandAlone, 1, 4, {"sharding": "fsdp"}),
]


def tuning(module: type[Tuned], accumulate: int = 1, **more: Any) -> Run:
    run = epochs(2, module=module, **more)
    run.trainer |= {"precision": "64-true", "accumulate_grad_batches": accumulate}
    return run


@pytest.mark.parametrize(("module", "accumulate", "ranks", "strategy"), CASES)
def test_what_is_trained_may_change(world: World, module, accumulate, ranks, strategy) -> None:
    reference = world.run(1, fit, tuning(module, accumulate))[0]
    run = tuning(module, accumulate, size=2, strategy=strategy)
    assert_equal_on_ranks(world.run(ranks, fit, run), reference, 1e-10)
    if issubclass(module, (WithFinetuning, TableLater)):  # all of it is trained in the end, or nothing was tested
        untuned = world.run(1, fit, Run(module=module, trainer={"precision": "64-true"}, steps=0))[0]
        assert all(worst_difference([reference[name]], [x]).error > 1e-6 for name, x in untuned.items())


class UnfreezesInAStep(Tuned):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head.requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.head.requires_grad_(batch_idx == 1)
        return super().training_step(batch, batch_idx)


class OfAnOptimizerAlone(Tuned):
    """Lightning does not know the parameter, nor does whoever averages gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.hidden = [nn.Parameter(torch.ones((), dtype=torch.float64))]

    def features(self, tokens: Tensor) -> Tensor:
        return super().features(tokens) * self.hidden[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.5)


class UnfreezesOnOneRank(TableLater):
    def on_train_epoch_start(self) -> None:
        if self.global_rank == 0:
            self.scale.requires_grad_(True)


class UnfreezesByRank(TableLater):
    def on_train_epoch_start(self) -> None:
        (self.backbone.positions if self.global_rank == 0 else self.scale).requires_grad_(True)


class WithAdafactor(Tuned):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


SOON = {"timeout": timedelta(seconds=2)}


@pytest.mark.parametrize(
    ("module", "ranks", "strategy", "words"),
    [
        (
            UnfreezesInAStep,
            2,
            {},
            "head.weight, head.bias: unfrozen or added during a training step.* Do it before the step",
        ),
        (OfAnOptimizerAlone, 2, {}, "parameter that does not belong to the LightningModule"),
        (UnfreezesOnOneRank, 2, SOON, "The ranks do not train the same parameters"),
        (UnfreezesByRank, 2, {}, "not by rank, nor by a value that differs"),
        (AdaptedLater, 2, FSDP, r"head.down.weight, .*: added after the parameters were sharded"),
        (InTheMidst, 4, {"sharding": "hybrid"}, "frozen or unfrozen while gradients accumulate"),
        (WithFinetuning, 2, FSDP, r"cannot be compared with those that are not .scale, backbone.positions.weight"),
        (WithAdafactor, 2, {}, "Adafactor computes the step of a row from other rows"),
    ],
)
def test_what_would_be_wrong_is_refused(world: World, module, ranks, strategy, words) -> None:
    with pytest.raises(WorkerError, match=words):
        world.run(ranks, fit, tuning(module, 2, size=2, strategy=strategy))


@pytest.mark.parametrize(
    "arguments", [({}, object()), ({"mixed_precision": 1}, None), ({"delay_all_reduce_named_params": []}, None)]
)
def test_what_would_survive_a_new_wrapper_is_refused(arguments) -> None:
    check_renewal({"find_unused_parameters": True}, None)
    with pytest.raises(MisconfigurationException, match=r"cannot follow with (ddp_comm_state|mixed_|delay_)"):
        check_renewal(*arguments)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, getattr(torch.optim, "Muon", torch.optim.Adafactor)])
def test_mixing_optimizers_may_have_other_parameters(optimizer) -> None:
    table, weight = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    check_optimizers([optimizer([weight])], False, [table])
    with pytest.raises(MisconfigurationException, match="RotaryEmbedding"):
        check_optimizers([optimizer([weight, table])], False, [table])


def names_ignored_by_ddp(rank: int, run: Run) -> tuple[list[str], list[str]]:
    during = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            during.extend(pl_module._ddp_params_and_buffers_to_ignore)

    module, trainer = make_module(run), make_trainer(rank, run, callbacks=[Look()])
    module._ddp_params_and_buffers_to_ignore = ["mine"]  # type: ignore[assignment]
    trainer.fit(module, make_loader(trainer, make_samples(run.samples), 2))
    return during, list(module._ddp_params_and_buffers_to_ignore)  # type: ignore[arg-type]


def test_what_ddp_ignores_does_not_grow(world: World) -> None:
    table = "backbone.positions.weight"
    for during, after in world.run(2, names_ignored_by_ddp, tuning(TableLater, size=2)):
        assert (during, after) == (["mine", table, f".{table}"], ["mine"])
