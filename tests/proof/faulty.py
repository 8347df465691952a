"""A right model, and what users do to it: each fault in one place, with the words of its cause."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lss import LSSAttention, RotaryEmbedding, sequence_shard, token_mean
from lightning_lss.nn.loss import IGNORED

WIDTH, VOCAB, LENGTH, HEADS = 16, 11, 16, 2


class Right(pl.LightningModule):
    """Every step is one method, so that a fault replaces one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )
        self.rotary, self.attention = RotaryEmbedding(WIDTH // HEADS), LSSAttention(causal=True)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(self.rotary(q), self.rotary(k), v)

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        targets = batch["targets"].flatten()
        total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        return token_mean(total, (targets != IGNORED).sum())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.mix(self.embed(batch["inputs"]))
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.loss(self.out(x + self.attend(q, k, v).transpose(1, 2).flatten(2)), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnPositions(Right):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.positions(torch.arange(x.size(1)))


class LocalTable(Right):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(64, WIDTH))

    def mix(self, x: Tensor) -> Tensor:
        return x + self.positions[: x.size(1)]


class ShiftedLabels(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        targets = batch["inputs"][:, 1:].flatten()
        return token_mean(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"), targets.numel())


class Convolution(Right):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Recurrence(Right):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Pooling(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.mean(1), batch["label"])


class ClassToken(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits[:, 0], batch["label"])


class PlainMean(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED)


class TokenNormalization(Right):
    def mix(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


class BatchNormalization(Right):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class OtherAttention(Right):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)


class WrittenOutAttention(Right):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class UnsplitTensor(Right):
    def mix(self, x: Tensor) -> Tensor:
        return x * self.weights[: x.size(1), None]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.weights = batch["weights"]
        return super().training_step(batch, batch_idx)


class UnsplitTensorOfAnotherShape(UnsplitTensor):
    def mix(self, x: Tensor) -> Tensor:
        return x * self.weights[:, None]


class SummedLoss(Right):
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORED, reduction="sum")


class RandomNumbers(Right):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class DetachedGather(Right):
    """The values of all ranks, but gradients of this one's alone."""

    def mix(self, x: Tensor) -> Tensor:
        shard = sequence_shard(self)
        whole = shard.gather(x.detach())
        return x + whole.mean(1, keepdim=True) + (x - x.detach()).mean(1, keepdim=True) / shard.size


class MaskedMean(Right):
    """A mean that is written out; `mask` says which tokens count."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        each = F.cross_entropy(logits.flatten(0, 1), batch["inputs"].flatten(), reduction="none")
        return (each * batch["mask"].flatten()).sum() / batch["mask"].sum()


class MaskedTargets(Right):
    """Targets that are made in the step."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        targets = batch["inputs"].masked_fill(batch["mask"] == 0, IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PaddedMean(Right):
    """Token 0 is padding."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["inputs"].flatten(), ignore_index=0)


class MergesPairs(Right):
    """Right where segments are of whole pairs of neighbours, and a segment is one run of positions or its chunks are too."""

    def mix(self, x: Tensor) -> Tensor:
        return x + x.unflatten(1, (-1, 2)).mean(2).repeat_interleave(2, 1)


class LosesGradients(Right):
    """Attention over what the other ranks have sent, behind a head that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.out.weight)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shard = sequence_shard(self)
        own = shard.positions(k.size(2))
        k, v = (shard.gather(x.detach(), dim=2).index_copy(2, own, x) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class WrongBeyondTheProof(Right):
    """A segment of more than 512 positions is another one, which a shortened batch does not have."""

    def mix(self, x: Tensor) -> Tensor:
        return x * 2 if x.size(1) > 512 else x


class WrongLater(Right):
    """From the second batch on segments count their own positions."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.counts_anew = batch_idx > 0
        return super().training_step(batch, batch_idx)

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.size(1))[:, None].cos() if self.counts_anew else x


class WrongByLittle(Right):
    """Every gradient is a hundredth too large."""

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(logits, batch) * (1.01 if sequence_shard(self).size > 1 else 1.0)


FAULTS = {
    OwnPositions: "Positions are counted from 0 on every rank",
    LocalTable: "A positional table is indexed locally: every rank takes the first rows of positions",
    ShiftedLabels: "Labels are shifted inside the step",
    Convolution: "A convolution or pooling window reaches across the border",
    Recurrence: "A recurrence along the sequence starts anew",
    Pooling: "Pooling over the tokens sees one segment only",
    ClassToken: "A class token",
    PlainMean: "The loss is a plain mean",
    TokenNormalization: "Normalization over the tokens",
    BatchNormalization: "Normalization over the tokens",
    OtherAttention: "Attention that was not recognized",
    WrittenOutAttention: "Attention that was not recognized",
    UnsplitTensor: "The batch entry weights has the whole sequence",
    UnsplitTensorOfAnotherShape: "The batch entry weights has the whole sequence",
    SummedLoss: "The loss is a sum over the segment",
    RandomNumbers: "Random numbers are drawn for one segment",
    DetachedGather: "The outputs agree, but gradients do not",
    LosesGradients: "The outputs agree, but gradients do not",
}

REMEDIES = {
    OwnPositions: "sequence_shard(self).positions(",
    LocalTable: "SegmentPositionalEmbedding",
    ShiftedLabels: "sequence_shard(self).shift(tokens, 1, fill=-100)",
    Convolution: "LSSStrategy(convert=True), or lightning_lss.SegmentConv1d",
    Recurrence: "sequence_shard(self).on_whole(recurrent, x)",
    Pooling: "shard.mean(x) or shard.sum(x)",
    ClassToken: "shard.first(x) or shard.last(x)",
    PlainMean: "token_mean(F.cross_entropy(",
    TokenNormalization: "LayerNorm or RMSNorm",
    BatchNormalization: "Trainer(sync_batchnorm=True)",
    OtherAttention: "lightning_lss.LSSAttention(causal=...)",
    WrittenOutAttention: "lightning_lss.LSSAttention(causal=...)",
    UnsplitTensor: "LSSStrategy(sequence_dims={'weights': 0})",
    UnsplitTensorOfAnotherShape: "LSSStrategy(sequence_dims={'weights': 0})",
    SummedLoss: "lightning_lss.token_mean",
    RandomNumbers: "lightning_lss.SegmentDropout",
    DetachedGather: "shard.gather(x)",
    LosesGradients: "shard.gather(x)",
}


def make_batch(length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, length), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[0, : length // 2 - 3] = IGNORED  # segments count different numbers of targets, contiguous and zigzag
    weights = torch.rand(length, generator=generator)
    mask = torch.ones(2, length)
    return {"inputs": tokens, "targets": targets, "label": torch.tensor([1, 2]), "weights": weights, "mask": mask}
