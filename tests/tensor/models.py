"""Modules that are written for one device, without a thought of a split sequence."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, HEADS = 23, 8, 2


class ForOneDevice(pl.LightningModule):
    """Trains with SGD, since Adam would hide a gradient that is wrong by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_batches(length: int, rows: int = 4, steps: int = 3) -> list[dict[str, Any]]:
    """Tokens, of whose labels each row leaves out a part of its own, a class for each row, and rows of unequal length."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(steps):
        tokens = torch.randint(1, VOCAB, (rows, length), generator=generator)
        labels = tokens.clone()
        for row in range(rows):
            labels[row, : 2 * row] = -100
        ragged = [own[: length - 2 * row] for row, own in enumerate(tokens)]
        classes = torch.randint(3, (rows,), generator=generator)
        batches.append({"tokens": tokens, "labels": labels, "classes": classes, "ragged": ragged})
    return batches


class CausalDecoder(ForOneDevice):
    """Positions from ``arange``, attention by torch, labels shifted in the step, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.head.weight = self.embed.weight

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        tokens, labels = batch["tokens"], batch["labels"]
        rows, length = tokens.size()
        x = self.embed(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for projection, norm in zip(self.projections, self.norms):
            q, k, v = (t.view(rows, length, HEADS, -1).transpose(1, 2) for t in projection(norm(x)).split(WIDTH, dim=2))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.transpose(1, 2).contiguous().view(rows, length, WIDTH)
        logits = self.head(x)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class Classifier(ForOneDevice):
    """A class token, a table that is cut, padding, torch's encoder, and the first token's class."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.table = nn.Parameter(torch.randn(64, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], dim=1)
        x = x + self.table[: x.size(1)]
        padding = F.pad(batch["tokens"] < 4, (1, 0), value=False)
        return F.cross_entropy(self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0]), batch["classes"])


class Seq2Seq(ForOneDevice):
    """Torch's decoder over a shorter memory, a causal mask as a table, and a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        length = x.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype, device=x.device)
        memory = self.embed(batch["tokens"][:, : length // 2]).tanh()
        h = self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)
        pooled = h.mean(dim=1)
        return F.cross_entropy(self.head(h).transpose(1, 2), batch["labels"]) + pooled.pow(2).mean()


class Genome(ForOneDevice):
    """Convolutions and a recurrence, with attention from its formula."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        x = x + F.gelu(self.wide(x.transpose(1, 2))).transpose(1, 2)
        scores = torch.einsum("bid,bjd->bij", x, x) * WIDTH**-0.5
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        x, _ = self.recurrent(x + torch.einsum("bij,bjd->bid", weights, x))
        losses = F.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten(), reduction="none")
        valid = batch["labels"].flatten() != -100
        return losses[valid].sum() / valid.sum()


class Experts(ForOneDevice):
    """Tokens are sent to one of two experts each, with a loss for their balance."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(batch["tokens"])
        flat = x.view(-1, WIDTH)
        probabilities = self.router(flat).softmax(-1)
        weight, chosen = probabilities.max(dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            out.index_add_(0, rows, expert(flat[rows]) * weight[rows, None])
        share = F.one_hot(chosen, 2).to(x.dtype).mean(0)
        balance = (share * probabilities.mean(0)).sum()
        logits = self.head(x + out.view(x.shape))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) + balance


class Ragged(ForOneDevice):
    """Fills rows of unequal length up in the step, on the right and on the left."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        rows: list[Tensor] = batch["ragged"]
        return self.loss(pad_sequence(rows, True)) + self.loss(pad_sequence(rows, True, padding_side="left"))

    def loss(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0))
        labels = tokens.masked_fill(tokens == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Habits(ForOneDevice):
    """Reentrant checkpointing, a hook on an activation, tensors that are made of others, losses that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def mix(self, x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x = self.embed(torch.as_tensor(batch["tokens"]))
        x = checkpoint(self.mix, x, use_reentrant=True) + checkpoint(torch.tanh, x, use_reentrant=True)
        x.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        scores = self.head(x).transpose(1, 2)
        self.kept.append(F.cross_entropy(scores, batch["labels"], reduction="none").detach())
        weights = torch.asarray(batch["tokens"]) / torch.stack(self.kept).amax()
        return F.cross_entropy(scores, batch["labels"]) + (scores.mean(1) * weights).mean()
