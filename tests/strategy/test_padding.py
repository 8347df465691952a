"""Modules that are written for segments train on sequences of any length, filled up with ``pad_values``."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_lss import (
    AttentionMask,
    InexactError,
    LSSAttention,
    LSSStrategy,
    RotaryEmbedding,
    SegmentConv1d,
    SegmentPositionalEmbedding,
    SequenceShard,
    lss_attention,
    sequence_shard,
    token_mean,
)
from lightning_lss.callbacks import RunLayout
from lightning_lss.sequence.batch import split_batch
from lightning_lss.sequence.padding import padding_of
from lightning_lss.testing.compare import assert_equal, assert_equal_on_ranks
from lightning_lss.testing.world import WorkerError, World
from tests.training import Run, as_it_is_trainer, make_module, make_samples, make_trainer, whole_state

VOCAB, WIDTH, HEADS, IGNORED = 13, 8, 2, -100
PAD_VALUES = {"tokens": 0, "targets": IGNORED}
PAD_INPUTS = {"inputs": 0, "targets": IGNORED}


class Everything(pl.LightningModule):
    """Uses all that crosses the border of a segment; ``table`` is a number of learned positions."""

    def __init__(self, table: int | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.table = None if table is None else SegmentPositionalEmbedding(table, WIDTH)
        self.near = SegmentConv1d(WIDTH, WIDTH, 3)
        self.qkv, self.rotary = nn.Linear(WIDTH, 3 * WIDTH), RotaryEmbedding(WIDTH // HEADS)
        self.both_ways, self.masked = LSSAttention(causal=False), LSSAttention(causal=True)
        self.out, self.classify = nn.Linear(WIDTH, VOCAB), nn.Linear(3 * WIDTH, 3)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = self.embed(batch["tokens"])
        if self.table is not None:
            x = x + self.table(x.size(1))
        x = x + self.near(x.mT).mT
        for attention, mask in ((self.both_ways, None), (self.masked, batch.get("mask"))):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + attention(self.rotary(q), self.rotary(k), v, mask).transpose(1, 2).flatten(2)
        shard = sequence_shard(self)
        return x, torch.cat([shard.mean(x), shard.last(x), shard.gather(x).amax(1)], -1)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        x, pooled = self(batch)
        following = sequence_shard(self).shift(batch["targets"], 1, fill=IGNORED)
        loss = F.cross_entropy(self.out(x).flatten(0, 1), following.flatten(), reduction="sum", ignore_index=IGNORED)
        return token_mean(loss, (following != IGNORED).sum()) + F.cross_entropy(self.classify(pooled), batch["classes"])

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        x, pooled = self(batch)
        return {"logits": self.out(x), "whole": sequence_shard(self).gather(self.out(x)), "pooled": pooled}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_batches(lengths: list[int], masked: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    batches: list[dict[str, Any]] = []
    for length in lengths:
        tokens = torch.randint(VOCAB, (2, length), generator=generator)
        batch = {"tokens": tokens, "targets": tokens.clone(), "classes": torch.randint(3, (2,), generator=generator)}
        if masked:
            starts = torch.rand(2, length, generator=generator) < 0.2
            batch["mask"] = AttentionMask.documents(starts.cumsum(1)) & AttentionMask.causal()
        batches.append(batch)
    return batches


def make(table: int | None, module: type[pl.LightningModule] = Everything) -> pl.LightningModule:
    torch.manual_seed(5)
    return module(table).double()


def train_alone(lengths: list[int], masked: bool, table: int | None) -> pl.LightningModule:
    module = make(table)
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(make_batches(lengths, masked)):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
    return module


def train(
    rank: int, lengths: list[int], masked: bool, table: int | None, size: int, layout: str
) -> tuple[dict[str, Tensor], list[Any]]:
    """The weights after training, and predictions."""
    warnings.simplefilter("ignore")
    trainer = as_it_is_trainer(rank, size, layout, pad_values=PAD_VALUES)
    loader = DataLoader(make_batches(lengths, masked), batch_size=None)
    module = make(table)
    trainer.fit(module, loader)
    assert trainer.strategy.verification.exact  # type: ignore[attr-defined]
    return whole_state(module), trainer.predict(module, loader)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("lengths", "masked", "table", "size", "layout"),
    [
        ([12, 13, 9], False, None, 2, "zigzag"),
        ([13, 14, 15], True, 16, 2, "zigzag"),
        ([10, 7, 2], True, None, 3, "contiguous"),
        ([31, 17, 32], True, None, 2, "balanced"),
        ([21, 32], True, None, 2, "auto"),
        ([33, 6], False, None, 4, "zigzag"),
    ],
)
def test_sequences_of_any_length(
    world: World, lengths: list[int], masked: bool, table: int | None, size: int, layout: str
) -> None:
    by_rank = world.run(size, train, lengths, masked, table, size, layout)
    alone = train_alone(lengths, masked, table)
    assert_equal_on_ranks([state for state, _ in by_rank], dict(alone.state_dict()), 1e-10)
    for index, batch in enumerate(make_batches(lengths, masked)):
        expected = alone.predict_step(batch, index)
        own = [predictions[index] for _, predictions in by_rank]
        for found in own:
            assert_equal([found["whole"], found["pooled"]], [expected["logits"], expected["pooled"]], 1e-10)
        counts = [found["logits"].size(1) for found in own]
        assert sum(counts) == lengths[index]  # padding is cut off


def train_transformer(rank: int, folder: str, length: int, positions: str) -> tuple[dict[str, Tensor], float]:
    """The weights after a batch of documents, and the number of operations that the module has counted."""
    warnings.simplefilter("ignore")
    run = Run(
        size=2, steps=1, model={"positions": positions, "seq_len": length + 1}, strategy={"pad_values": PAD_INPUTS}
    )
    trainer = make_trainer(rank, run, callbacks=[RunLayout()], logger=TensorBoardLogger(folder, name="", version=""))
    module = make_module(run).double()
    trainer.fit(module, DataLoader([documents_of(length)], batch_size=None))
    assert trainer.strategy.verification.exact  # type: ignore[attr-defined]
    module.train()
    return whole_state(module), module.flops_per_batch  # type: ignore[return-value]


def documents_of(length: int) -> dict[str, Any]:
    batch: dict[str, Any] = default_collate(make_samples(2, length))
    mask = AttentionMask.documents((torch.arange(length) // 5)[None]) & AttentionMask.causal()
    return {**batch, "mask": mask}


# the longer one is proved on a part of its positions
@pytest.mark.parametrize(("length", "positions"), [(15, "rotary"), (2055, "learned")])
def test_the_transformer_counts_no_padding(world: World, tmp_path: Path, length: int, positions: str) -> None:
    by_rank = world.run(2, train_transformer, str(tmp_path), length, positions)
    module = make_module(Run(model={"positions": positions, "seq_len": length + 1})).double()
    optimizer = module.configure_optimizers()
    module.training_step(documents_of(length), 0).backward()  # type: ignore[operator]
    optimizer.step()  # type: ignore[union-attr]
    assert_equal_on_ranks([state for state, _ in by_rank], dict(module.state_dict()), 1e-10)
    assert sum(flops for _, flops in by_rank) == pytest.approx(module.flops_per_batch)


class CountsPadding(Everything):
    """The mean of this rank's positions, padding included."""

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return super().training_step(batch, index) + 0.1 * self(batch)[0].square().mean()


def refuse(rank: int, lengths: list[int], dtype: torch.dtype) -> tuple[int, str]:
    warnings.simplefilter("ignore")
    trainer = as_it_is_trainer(rank, 2, pad_values=PAD_VALUES)
    with pytest.raises(InexactError) as refusal:
        trainer.fit(make(None, CountsPadding).to(dtype), DataLoader(make_batches(lengths, False), batch_size=None))
    return trainer.global_step, str(refusal.value)


# with float32, one padded position of 512 may be rounding
@pytest.mark.parametrize(
    ("lengths", "dtype", "steps"), [([16, 16, 15], torch.float64, 2), ([1023, 5], torch.float32, 1)]
)
def test_what_counts_padding_is_refused_at_the_first_batch_that_has_so_much(
    world: World, lengths: list[int], dtype: torch.dtype, steps: int
) -> None:
    for taken, words in world.run(2, refuse, lengths, dtype):
        assert taken == steps, words
        assert "segments have different numbers of tokens that count" in words


def fit_bad(rank: int, pad_values: dict[str, Any], batch: dict[str, Tensor]) -> None:
    trainer = as_it_is_trainer(rank, 2, pad_values=pad_values)
    trainer.fit(make(None), DataLoader([batch], batch_size=None))


@pytest.mark.parametrize(
    ("pad_values", "more", "words"),
    [
        ({"tokens": 0}, {}, r"targets \(2, 13\) cannot be cut into 4 equal chunks.*Add 'targets': value"),
        ({**PAD_VALUES, "weights": 1.5}, {"weights": torch.ones(2, 13).long()}, r"weights \(2, 13\) cannot hold 1.5"),
        ({**PAD_VALUES, "far": 0}, {"far": torch.ones(2, 16)}, r"far \(2, 16\) lacks 0"),
    ],
)
def test_batches_that_cannot_be_filled_up_are_refused(
    world: World, pad_values: dict[str, Any], more: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(WorkerError, match=words):
        world.run(2, fit_bad, pad_values, {**make_batches([13], False)[0], **more})


def test_any_number_fills_up_what_has_a_fraction() -> None:
    assert (
        padding_of({"x": torch.ones(2, 13), "y": torch.ones(2, 13).half()}, 4, {"x": 0.1, "y": float("nan")}, None) == 3
    )


def test_a_batch_that_is_one_tensor_has_no_key() -> None:
    with pytest.raises(ValueError, match=r"batch \(2, 13\) cannot be cut.*let the loader give it in a dict"):
        padding_of(torch.ones(2, 13), 4, {0: 0}, None)
    with pytest.raises(ValueError, match="let the loader give the batch in a dict, and say with what"):
        split_batch(torch.ones(2, 13), SequenceShard(0, 2))


def test_values_that_the_batch_does_not_have_are_named() -> None:
    with pytest.warns(UserWarning, match=r"pad_values names \['labels'\]"):
        assert padding_of({"tokens": torch.ones(2, 12)}, 4, {"labels": 0}, None) == 0


class CutsItself(Everything):
    def shard_batch(self, batch: Any, shard: Any) -> Any:
        return batch


def refuse_module(rank: int) -> None:
    trainer = as_it_is_trainer(rank, 2, pad_values=PAD_VALUES)
    with pytest.raises(MisconfigurationException, match=r"CutsItself.shard_batch cuts batches itself"):
        trainer.fit(CutsItself(None), DataLoader([1]))


def test_settings_that_cannot_hold_are_refused_at_once(world: World) -> None:
    with pytest.raises(ValueError, match="pad_values=0 must be numbers by batch entry"):
        LSSStrategy(pad_values=0)  # type: ignore[arg-type]
    world.run(2, refuse_module)  # a Trainer of this process would start pytest anew, as its second rank


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (6, {"causal": False}),  # split as well, but of another length
        (16, {"mask": AttentionMask.documents(torch.zeros(1, 15, dtype=torch.int64)), "whole_memory": True}),
    ],
)
def test_a_memory_that_cannot_be_filled_up_alike_is_refused(memory: int, options: dict[str, Any]) -> None:
    q, memory_of = torch.ones(1, 1, 8, 4), torch.ones(1, 1, memory, 4)
    with pytest.raises(ValueError, match=r"filled up by 1 positions to 16 queries, but a memory of \d+ keys"):
        lss_attention(q, memory_of, memory_of, SequenceShard(0, 2, "zigzag", padding=1), **options)
