"""What is right is not refused, and is proved, whatever the precision and the options."""

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lss import (
    AttentionMask,
    LSSAttention,
    LSSTransformer,
    SegmentDropout,
    SegmentPositionalEmbedding,
    lss_attention,
    sequence_shard,
    token_mean,
)
from tests.modules import OwnModule
from tests.proof.faulty import HEADS, LENGTH, VOCAB, WIDTH, Right, make_batch
from tests.proof.verdict import verdict
from tests.training import Run, make_trainer


class Ours(LSSTransformer):
    def __init__(self, **options: Any) -> None:
        tiny = {
            "vocab_size": VOCAB,
            "seq_len": LENGTH,
            "width": WIDTH,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
        }
        super().__init__(**{**tiny, **options})


class OursLearned(Ours):
    def __init__(self) -> None:
        super().__init__(positions="learned", dropout=0.1)


class OursSparing(Ours):
    def __init__(self) -> None:
        super().__init__(activation_checkpointing="selective", mlp_tiles=2)


class OwnOfUsers(OwnModule):
    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, width=WIDTH, num_heads=2)


class EvenPlainMean(Right):
    """Every segment counts as many targets."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["inputs"].flatten())


class GatheredPooling(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(sequence_shard(self).gather(logits).mean(1), batch["label"])


class GatheredClassToken(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(sequence_shard(self).gather(logits)[:, 0], batch["label"])


class GatheredConvolution(Right):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        shard = sequence_shard(self)
        return x + shard.split(self.conv(shard.gather(x).transpose(1, 2)).transpose(1, 2))


class OwnGlobalPositions(Right):
    """With a length of its own, which a shortened batch does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(LENGTH, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        shard = sequence_shard(self)
        assert x.size(1) * shard.size == LENGTH
        return x + self.positions(shard.positions(x.size(1), device=x.device))


class Dropouts(Right):
    def __init__(self) -> None:
        super().__init__()
        self.elements, self.table = SegmentDropout(0.3), SegmentPositionalEmbedding(LENGTH, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return F.dropout(self.elements(x + self.table(x.size(1))), 0.2, self.training)


class Bidirectional(Right):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LSSAttention(causal=False)


class Functional(Right):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lss_attention(self.rotary(q), self.rotary(k), v, shard=sequence_shard(self), causal=True)


class Adapter(Right):
    """A frozen model with an adapter that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x))


class TableAlone(Right):
    """Nothing is left for DistributedDataParallel."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.table = SegmentPositionalEmbedding(LENGTH, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.table(x.size(1))


class RandomSamples(Right):
    """Random numbers of whole samples, as in stochastic depth and diffusion steps."""

    def mix(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.size(0), 1, 1)


class ReadsPadding(Right):
    """A mean over tokens that is written out."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        shard, targets = sequence_shard(self), batch["targets"]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        each, counts = shard.gather(each), shard.gather((targets >= 0).to(each))
        return (each * counts).sum() / counts.sum()


class MeanOfMeans(Right):
    """Exact, though it calls a loss that is a mean."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        targets = batch["targets"].flatten()
        count = (targets >= 0).sum()
        return token_mean(F.cross_entropy(logits.flatten(0, 1), targets) * count, count)


class LogsAMean(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            self.log("mean", F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()))
        return super().loss(logits, batch)


class OwnAutocast(Right):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().training_step(batch, batch_idx)


class KeepsItsShard(OwnGlobalPositions):
    def on_fit_start(self) -> None:
        self.own = sequence_shard(self)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.positions(self.own.positions(x.size(1)))


class Sparse(Right):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, sparse=True)


class AsksHowManyRanks(Right):
    """Torch, Lightning and the shard agree on it."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        shard = sequence_shard(self)
        ranks = dist.get_world_size(), self.trainer.world_size, self.trainer.strategy.sequence_parallel_size
        assert set(ranks) == {shard.size}
        assert dist.get_rank() == self.global_rank == shard.rank
        return super().loss(logits, batch)


class ZeroHead(Right):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.out.weight)


class Documents(Right):
    """Its batches have a mask, which is shortened with them."""

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        ids = (batch["inputs"] < 2).cumsum(1)
        return {**batch, "mask": AttentionMask.documents(ids) & AttentionMask.causal()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.attention.mask = batch["mask"]
        return super().training_step(batch, batch_idx)


class OfAFunction(Right):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LSSAttention(mask=AttentionMask.from_function(lambda b, h, q, k: (q - k).abs() <= 3 + h))


class WindowWithSinks(Right):
    def __init__(self) -> None:
        super().__init__()
        self.attention = LSSAttention(mask=AttentionMask.sliding_window(5), softcap=3.0, dropout=0.2)
        self.sinks = nn.Parameter(torch.zeros(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(self.rotary(q), self.rotary(k), v, sinks=self.sinks)


class CachesPositions(Right):
    """By the length, in a function: what the proof leaves there stays."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = lru_cache(lambda length: sequence_shard(self).positions(length))

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.cos(self.positions(x.size(1)).to(x)).unsqueeze(-1)


class LongMemory(Right):
    """Attends to a memory that is longer than the tokens and is split too."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.cross = nn.Linear(HEADS, 2 * WIDTH), LSSAttention(causal=False)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        length = batch["inputs"].size(1) * 3 // 2
        return {**batch, "memory": torch.linspace(-1, 1, length * 2 * HEADS).view(2, length, HEADS)}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.__dict__["keys"] = self.memory(batch["memory"]).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return super().training_step(batch, batch_idx)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) + self.cross(q, *self.__dict__["keys"])


SOUND = [
    Ours,
    OursLearned,
    OursSparing,
    OwnOfUsers,
    EvenPlainMean,
    GatheredPooling,
    GatheredClassToken,
    GatheredConvolution,
]
SOUND += [OwnGlobalPositions, Dropouts, Bidirectional, Functional, Adapter, RandomSamples, ReadsPadding]
SOUND += [MeanOfMeans, LogsAMean, OwnAutocast, KeepsItsShard, Sparse, ZeroHead, AsksHowManyRanks, TableAlone]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("module", SOUND)
def test_a_sound_module_is_proved(world, module, layout) -> None:
    assert world.run(2, verdict, module, Run(size=2, layout=layout, steps=1)) == ["", ""]


@pytest.mark.parametrize("length", [16, 32, 4096])
def test_a_memory_longer_than_the_tokens_is_shortened_with_them(world, length) -> None:
    run = Run(size=2, steps=1, strategy={"sequence_dims": {"memory": 1}})
    assert world.run(2, verdict, LongMemory, run, length) == ["", ""]


def cached_positions(rank: int, layout: str) -> tuple[list[int], list[int]]:
    """Train; return the positions that the module has cached for its segment, and the right ones."""
    model, trainer = CachesPositions(), make_trainer(rank, Run(size=2, layout=layout, steps=1))
    trainer.fit(model, DataLoader([make_batch(32)], batch_size=None, shuffle=False))
    return model.positions(16).tolist(), trainer.strategy.sequence_shard.positions(16).tolist()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_the_proof_leaves_nothing_under_the_length_of_a_segment(world, layout) -> None:
    for cached, right in world.run(2, cached_positions, layout):
        assert cached == right


@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
@pytest.mark.parametrize("module", [Documents, OfAFunction, WindowWithSinks])
def test_a_sound_module_with_a_mask_is_proved(world, module, layout) -> None:
    assert world.run(2, verdict, module, Run(size=2, layout=layout, steps=1)) == ["", ""]


@pytest.mark.parametrize("module", [OursLearned, OwnOfUsers, Dropouts])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_in_every_precision(world, module, precision) -> None:
    run = Run(size=2, steps=1, trainer={"precision": precision})
    assert world.run(2, verdict, module, run) == ["", ""]
