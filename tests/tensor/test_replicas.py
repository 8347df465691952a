"""Data replicas whose batches let them compute different things."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lss.testing.compare import assert_equal_on_ranks
from lightning_lss.testing.world import World
from tests.tensor.models import VOCAB, ForOneDevice, make_batches
from tests.training import as_it_is_trainer, whole_state


class Sometimes(ForOneDevice):
    """A loss of some tokens where the first of the batch is small, and then that of all."""

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        x = self.embed(tokens)
        scores = self.head(x * x.mean(1, keepdim=True)).transpose(1, 2)
        loss = x.mean()
        if int(tokens[0, 0]) < VOCAB // 2:
            labels = tokens.masked_fill(torch.arange(tokens.size(1)) > 4, -100)
            loss = loss + F.cross_entropy(scores, labels)
        self.log("so far", loss.detach(), sync_dist=True)  # a collective over all ranks
        return loss + F.cross_entropy(scores, tokens)


class SometimesByHand(Sometimes):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, tokens: Tensor, index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for _ in range(2):
            loss = super().training_step(tokens, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


BATCHES = [batch["tokens"] for batch in make_batches(13, rows=2)]  # a row on each of two replicas
for batch, first in zip(BATCHES, ([1, VOCAB - 1], [1, 2], [VOCAB - 2, 2])):
    batch[:, 0] = torch.tensor(first)


def make(module: type[Sometimes]) -> Sometimes:
    torch.manual_seed(2)
    return module().double()


def train(rank: int, kind: type[Sometimes]) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = make(kind)
    as_it_is_trainer(rank, 2).fit(module, DataLoader([x[rank // 2][None] for x in BATCHES], batch_size=None))
    return whole_state(module)


def train_alone(steps: int) -> dict[str, Tensor]:
    """The mean of the replicas' losses, as on DistributedDataParallel."""
    module = make(Sometimes)
    optimizer = module.configure_optimizers()
    for batch in (x for x in BATCHES for _ in range(steps)):
        optimizer.zero_grad()
        torch.stack([module.training_step(row[None], 0) for row in batch]).mean().backward()
        optimizer.step()
    return {key: x.detach() for key, x in module.state_dict().items()}


def test_replicas_that_compute_different_losses(world: World) -> None:
    for kind, steps in ((Sometimes, 1), (SometimesByHand, 2)):
        assert_equal_on_ranks(world.run(4, train, kind), train_alone(steps), 1e-10)
