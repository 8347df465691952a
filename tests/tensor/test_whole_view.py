"""What a module and its callbacks see in a run that shows whole sequences, and what is refused."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, SumMetric

from lightning_lss import InexactError, LSSAttention, LSSStrategy, SplitTensor, lss_attention, sequence_shard
from lightning_lss.sequence.segment import SequenceShard
from lightning_lss.tensor import Placement, split
from lightning_lss.testing.world import World
from tests.tensor.models import VOCAB, CausalDecoder, make_batches
from tests.training import as_it_is_trainer


def fit(rank: int, module: pl.LightningModule, size: int, length: int = 16, **options: Any) -> pl.Trainer:
    replicas = dist.get_world_size() // size
    trainer = as_it_is_trainer(rank, size, **options)
    batches = make_batches(length)
    own = [{name: x[rank // size :: replicas] for name, x in batch.items()} for batch in batches]
    trainer.fit(module, DataLoader(own, batch_size=None), DataLoader(own, batch_size=None))
    return trainer


class Watching(CausalDecoder):
    """Notes what it is shown, and counts tokens with metrics and in its log."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mean = SumMetric(), MeanMetric()
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        tokens = batch["tokens"]
        self.seen.append((type(tokens), tuple(tokens.shape), sequence_shard(self).size))
        self.log("ids", tokens.double().mean())
        return super().training_step(batch, index)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.tokens.update((batch["labels"] != -100).sum())
        self.mean.update(batch["tokens"].double())
        self.log("tokens", self.tokens)
        self.log("mean", self.mean)
        count = (batch["labels"] != -100).double().sum()
        self.log("summed", count, reduce_fx="sum")
        self.log("summed over all", count, reduce_fx="sum", sync_dist=True)


def watch(rank: int, size: int) -> tuple[list[Any], dict[str, float]]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = Watching()
    trainer = fit(rank, module, size, length=15)
    assert torch.autograd.Function.apply.__func__.__module__ == "torch.autograd.function"
    return module.seen, {name: float(x) for name, x in trainer.callback_metrics.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_sees_and_counts_the_whole(world: World, ranks: int) -> None:
    batches = make_batches(15)
    count = sum(int((x["labels"] != -100).sum()) for x in batches)
    mean = torch.stack([x["tokens"].double().mean() for x in batches])
    for rank, (seen, metrics) in enumerate(world.run(ranks, watch, 2)):
        assert seen[-1] == (SplitTensor, (4 * 2 // ranks, 15), 1)
        assert metrics["tokens"] == metrics["summed over all"] == count
        assert metrics["mean"] == pytest.approx(float(mean.mean()), abs=1e-5)
        assert metrics["ids"] == pytest.approx(float(mean[-1]), abs=1e-5)
        own = [x["labels"][rank // 2 :: ranks // 2] for x in batches]  # a sum is that of the data replica, as on DDP
        assert metrics["summed"] == sum(int((x != -100).sum()) for x in own)


class Squared(torch.autograd.Function):
    """A function of a user's own, with a sum over the sequence in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sum(1, keepdim=True) + (grad * x).sum(1, keepdim=True)


class OwnFunction(CausalDecoder):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = Squared.apply(self.embed(batch["tokens"]))
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        x = x + lss_attention(q, q, q, sequence_shard(self), causal=True).transpose(1, 2).flatten(2)
        loss = F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())
        return loss + super().training_step(batch, index)


class LooksAtMemory(CausalDecoder):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        x.data_ptr()
        return super().training_step(batch, index)


class WeighsByGradients(CausalDecoder):
    """The weight of a loss is the norm of its gradient, as in adversarial autoencoders."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        (gradient,) = torch.autograd.grad(loss, self.embed.weight, retain_graph=True)
        return loss * gradient.norm().detach()


class OwnGradients(CausalDecoder):
    """A gradient of what no sequence takes part in."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        (gradient,) = torch.autograd.grad(self.embed.weight.square().sum(), self.embed.weight, create_graph=True)
        return super().training_step(batch, index) + gradient.square().mean()


class UsesWeights(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        out, weights = self.attention(x, x, x)
        return out.mean() + weights.sum()


class Mapped(CausalDecoder):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        x = (
            x
            + vmap(lambda row: (row @ row.T).softmax(-1) @ row)(x)
            + vmap(grad(lambda row: row.mean(0).pow(3).sum()))(x)
        )
        return F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())


@torch.jit.script
def summed_before(x: Tensor) -> Tensor:
    return x.cumsum(1) - x


class ScriptedSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / x.size(1)


class Scripted(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.jit.script(ScriptedSum())

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        return super().training_step(batch, index) + self.head(self.sum(x) + summed_before(x)).square().mean()


class MappedFromOutside(CausalDecoder):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        return vmap(lambda factor: (x * factor).sum())(torch.ones(3, dtype=x.dtype)).sum()


class Hooked(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_full_backward_hook(lambda module, grad_input, grad_output: None)


class InnerGradient(CausalDecoder):
    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        (gradient,) = torch.autograd.grad(loss, self.head.weight, retain_graph=True)
        return loss + (gradient * self.head.weight).sum()


class PooledGradient(CausalDecoder):
    """Differentiates what every rank computes alone."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        pooled = self.embed(batch["tokens"]).mean(1)
        (gradient,) = torch.autograd.grad(self.head(pooled).logsumexp(-1).sum(), pooled, create_graph=True)
        return super().training_step(batch, index) + gradient.square().sum()


class ManyLosses(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
        scores = self.head(self.embed(batch["tokens"]) + self.positions.weight[:16])
        losses = F.cross_entropy(scores.transpose(1, 2), batch["labels"], reduction="none")
        self.manual_backward(losses, torch.full_like(losses, 0.1))


class WithSegments(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LSSAttention()


def outcome(rank: int, module: type[pl.LightningModule], options: dict[str, Any]) -> tuple[str, list[str]]:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = fit(rank, module().double(), 2, **options)
            said = str(trainer.strategy.verification)  # type: ignore[attr-defined]
        except (InexactError, pl.utilities.exceptions.MisconfigurationException) as error:
            said = str(error)
    return said, [str(x.message) for x in caught]


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (OwnFunction, {}, "exact: 11 gradients"),
        (
            WeighsByGradients,
            {},
            "torch.autograd.grad is not known for a sequence that is split. Call backward() instead",
        ),
        (OwnGradients, {}, "exact: 11 gradients"),
        (LooksAtMemory, {}, "data_ptr is not known for a sequence that is split"),
        (LooksAtMemory, {}, "Give a kernel of your own whole tensors, in a torch.autograd.Function"),
        (UsesWeights, {}, "weights of attention along a split sequence are not computed"),
        (Mapped, {"find_unused_parameters": True}, "exact: "),
        (MappedFromOutside, {}, "give it to their function as an argument"),
        (Hooked, {}, "Hook the tensor instead"),
        (InnerGradient, {}, "torch.autograd.grad is not known"),
        (PooledGradient, {}, "exact: "),
        (ManyLosses, {"find_unused_parameters": True}, "exact: "),
        (Scripted, {}, "exact: "),
        (WithSegments, {"view": "whole"}, "attention (LSSAttention) is written for segments"),
        (CausalDecoder, {"view": "segment"}, "Attention that was not recognized"),
    ],
)
def test_what_is_exact_and_what_is_refused(world: World, module: Any, options: dict[str, Any], words: str) -> None:
    for said, _ in world.run(2, outcome, module, options):
        assert words in said


class Recurrent(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x, _ = self.lstm(self.embed(batch["tokens"]))
        return F.cross_entropy(self.head(x).view(-1, VOCAB), batch["labels"].view(-1))


def test_what_every_rank_computes_whole_is_said(world: World) -> None:
    _, said = world.run(2, outcome, Recurrent, {})[0]
    found = [
        x for x in said if "`lstm` has no rule for a sequence that is split: every rank computes it on the whole" in x
    ]
    assert len(found) == 1  # not at every step, nor in the proof


class Compiled(CausalDecoder):
    def __init__(self) -> None:
        super().__init__()
        self.norms.compile(backend="aot_eager")
        self.head = torch.compile(self.head, backend="aot_eager")  # type: ignore[assignment]


def test_what_runs_without_compilation_is_said(world: World) -> None:
    (said, warned), (other, _) = world.run(2, outcome, Compiled, {})
    assert said.startswith("exact: ")
    assert other.startswith("exact: ")
    assert any(x.startswith("head, norms: compiled, but run without compilation") for x in warned)


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(ValueError, match="view='all' is unknown: choose one of 'segment', 'whole', 'auto'"):
        LSSStrategy(view="all")  # type: ignore[arg-type]


def pooled(rank: int) -> type:
    x = split(torch.ones(2, 8, 5), Placement(1, 8, SequenceShard(rank, 2, "zigzag", dist.group.WORLD)))
    return type(x.amax(1))


def test_what_is_left_of_a_sequence_is_not_one(world: World) -> None:
    assert world.run(2, pooled) == [Tensor, Tensor]


def refusals(rank: int) -> list[str]:
    x = split(torch.ones(2, 8, 3), Placement(1, 8, SequenceShard(rank, 2, "zigzag", dist.group.WORLD)))
    calls = (
        lambda: torch.autograd.grad(x.sum(), x),
        lambda: torch._foreach_mul_([x], 2.0),
        lambda: torch.add(x, x, out=torch.empty(2, 8, 3)),
    )
    said = []
    for call in calls:
        with pytest.raises(NotImplementedError) as error:
            call()
        said.append(str(error.value))
    return said


def test_functions_that_are_refused(world: World) -> None:
    grad, foreach, out = world.run(2, refusals)[0]
    assert "torch.autograd.grad is not known" in grad
    assert "_foreach_mul_ is not known for a list of tensors" in foreach
    assert "add(out=...) is not known" in out
