"""A synthetic task that cannot be learned without attention over half of the sequence."""

from dataclasses import dataclass

import numpy as np
import torch

from lightning_lss.data.sequences import Sample, SampleDataset, SequenceDataModule, Split
from lightning_lss.nn.loss import IGNORED
from lightning_lss.sequence.layout import check_positive

_STREAM: dict[Split, int] = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class RecallDataset(SampleDataset):
    """Samples in which ``targets[L/2:]`` equals ``inputs[:L/2]``.

    At position i >= L/2 the token to predict is the one at i - L/2. Earlier targets would be random; they are -100, so
    the loss ignores them. A sample depends only on the seed and its index, so it is the same in every process.
    """

    seq_len: int  # L, even
    vocab_size: int
    num_samples: int
    seed: tuple[int, ...]  # two or more integers, each at least 0; different seeds give different datasets

    def sample(self, index: int) -> Sample:
        """Draw the sample at ``index``."""
        half = self.seq_len // 2
        # L + 1 tokens are needed. The first L/2 + 1 are random; the others repeat the first L/2.
        drawn = np.random.default_rng((*self.seed, index)).integers(self.vocab_size, size=half + 1)
        tokens = torch.from_numpy(np.concatenate((drawn, drawn[:half])))  # int64 [L + 1]
        targets = tokens[1:].clone()
        targets[:half] = IGNORED
        return {"inputs": tokens[:-1], "targets": targets}


class RecallDataModule(SequenceDataModule):
    """Random tokens whose second half repeats the first; only the second half counts in the loss.

    A model that sees the whole sequence reaches a loss of 0. A model that sees less than half of it stays at
    ln(vocab_size).

    Args:
        vocab_size: number of token values.
        train_samples: number of samples in an epoch.
        val_samples: number of samples for validation, and of others for test.
        seed: different seeds give different samples.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        ValueError: if a number is out of range or ``seq_len`` is odd.
    """

    def __init__(
        self,
        seq_len: int,
        batch_size: int,
        vocab_size: int = 16,
        train_samples: int = 10_000,
        val_samples: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        if seq_len % 2:
            raise ValueError(f"seq_len={seq_len} must be even, so that its second half can repeat the first.")
        check_positive(train_samples=train_samples, val_samples=val_samples)
        if vocab_size < 2 or seed < 0:
            raise ValueError(f"vocab_size={vocab_size} must be at least 2, and seed={seed} at least 0.")
        self.vocab_size, self.seed = vocab_size, seed
        self.num_samples: dict[Split, int] = {"train": train_samples, "val": val_samples, "test": val_samples}

    def dataset(self, split: Split) -> RecallDataset:
        """Return the samples of ``split``; each split has a random stream of its own."""
        return RecallDataset(self.seq_len, self.vocab_size, self.num_samples[split], (self.seed, _STREAM[split]))
