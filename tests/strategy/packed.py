"""Modules whose batches have packed documents, and runs of them."""

from typing import Any

import torch
from torch import Tensor

from lightning_lss import (
    AttentionMask,
    sequence_shard,
)
from lightning_lss.sequence.segment import SequenceShard
from tests.training import (
    LENGTH,
    Run,
    SGDTransformer,
    fit,
)

ROTARY = {"positions": "rotary"}
STALE = "This SequenceShard is of an earlier batch"
UNEVEN = AttentionMask.documents((torch.arange(LENGTH) - LENGTH // 2).clamp(min=0)[None]) & AttentionMask.causal()
"""One long document, and many of a token."""


def documents(tokens: Tensor) -> AttentionMask:
    """A document starts at every token 0 and 1."""
    return AttentionMask.documents((tokens < 2).cumsum(1)) & AttentionMask.causal()


class Packed(SGDTransformer):
    """Its batches have packed documents."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[str, SequenceShard]] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "mask": documents(batch["inputs"])}

    def _loss(self, batch: Any) -> Any:
        assert isinstance(batch["mask"], AttentionMask)
        self.seen.append((self.trainer.state.stage.value, sequence_shard(self)))
        return super()._loss(batch)


def run_of(size: int, layout: str, module: Any = Packed, **more: Any) -> Run:
    trainer = {"precision": "64-true", **more.pop("trainer", {})}
    return Run(size, layout, more.pop("model", ROTARY), trainer, module=module, **more)


class Sometimes(Packed):
    """The mask of the fourth batch, unlike those before it, has one long document and many of a token."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        odd = int(batch["inputs"].sum()) % 2 == 1
        return {**batch, "mask": AttentionMask.causal() if odd else UNEVEN}


def message_of_fit(rank: int, run: Run) -> str:
    try:
        fit(rank, run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
