"""The common part of the data modules: tokens on disk, samples cut from them, and the loaders."""

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_lss.sequence.layout import check_positive

Split = Literal["train", "val", "test"]
Sample = dict[str, Tensor]

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
_STAGES: dict[Split, set[str]] = {"train": {"fit"}, "val": {"fit", "validate"}, "test": {"test", "predict"}}


class TokenFiles:
    """The tokens of one or several files, joined end to end into one stream; ``dtype`` is a token's in the files, in
    this machine's byte order.

    The files are memory-mapped when read, so they may be larger than memory. The object itself holds only paths and
    sizes, so it can be sent to the workers of a DataLoader at no cost.
    """

    def __init__(self, paths: Sequence[Path], dtype: str = "uint8") -> None:
        if dtype not in TOKEN_DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(map(repr, TOKEN_DTYPES))}.")
        self.dtype = np.dtype(dtype)
        sizes = {path: path.stat().st_size for path in paths}
        token = self.dtype.itemsize
        for path, size in sizes.items():
            if size % token:
                raise ValueError(
                    f"{path} has {size} bytes, which is not a multiple of the {token} bytes of a token of dtype={dtype!r}. "
                    "Give the dtype that the file was written with."
                )
        self.paths = [path for path in paths if sizes[path]]  # an empty file cannot be mapped
        self._starts = [0, *itertools.accumulate(sizes[path] // token for path in self.paths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Return tokens ``start`` to ``stop`` (exclusive) of the stream, int64 [stop - start]."""
        assert 0 <= start < stop <= len(self)
        touched = slice(bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop))
        files = zip(self.paths[touched], self._starts[touched])
        pieces = [np.memmap(path, self.dtype, "r")[max(start - begin, 0) : stop - begin] for path, begin in files]
        return torch.from_numpy(np.concatenate(pieces, dtype=np.int64))


class SampleDataset(Dataset[Sample], ABC):
    """A map-style dataset of samples ``{"inputs": int64 [L], "targets": int64 [L]}``; targets are already shifted."""

    num_samples: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Sample {index} does not exist: there are {len(self)}.")
        return self.sample(index)

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """Return the sample at ``index``, which is in range."""


class WindowDataset(SampleDataset):
    """Windows of ``span``, a part of a token stream that errors call ``name``; by default of all of it.

    Sample i consists of the tokens i*L to i*L + L + 1 (exclusive) of that part, so no two share a target.
    """

    def __init__(
        self, tokens: TokenFiles, seq_len: int, vocab_size: int, span: range | None = None, name: str = "text"
    ) -> None:
        self.tokens, self.seq_len, self.vocab_size = tokens, seq_len, vocab_size
        self.span = range(len(tokens)) if span is None else span
        self.num_samples = (len(self.span) - 1) // seq_len
        if self.num_samples < 1:
            raise ValueError(
                f"The {name} holds {len(self.span)} tokens, fewer than the seq_len + 1 = {seq_len + 1} of one sample. "
                f"Use a seq_len of at most {max(0, len(self.span) - 1)}, or more text."
            )

    def sample(self, index: int) -> Sample:
        """Return a window; raise ``ValueError`` if one of its tokens is out of range."""
        start = self.span.start + index * self.seq_len
        tokens = self.tokens.read(start, start + self.seq_len + 1)  # [L + 1]
        least, most = (int(x) for x in tokens.aminmax())
        if least < 0 or most >= self.vocab_size:  # the embedding would fail, on CUDA without a reason
            raise ValueError(
                f"Tokens {start} to {start + self.seq_len} range from {least} to {most}, outside "
                f"[0, {self.vocab_size}). Give the vocab_size and dtype that the text was written with."
            )
        return {"inputs": tokens[:-1], "targets": tokens[1:]}


def spans_by_position(length: int, shares: Sequence[float]) -> dict[Split, range]:
    """Cut a stream of ``length`` tokens into three parts: training, then validation, then test.

    Raises ``ValueError`` if ``shares`` are not three positive numbers that sum to 1.
    """
    if len(shares) != 3 or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"splits={tuple(shares)} must be three positive shares (training, validation, test) that sum to 1."
        )
    val, test = (round(length * share) for share in (shares[0], shares[0] + shares[1]))
    return {"train": range(val), "val": range(val, test), "test": range(test, length)}


class SequenceDataModule(pl.LightningDataModule, ABC):
    """Loaders of batches ``{"inputs": int64 [B, L], "targets": int64 [B, L]}``. Prediction uses the test split.

    The loaders have no distributed sampler: Lightning adds one for the strategy's data rank. A subclass defines
    :meth:`dataset`, and sets ``vocab_size`` and ``bytes_per_token`` if its tokens are not bytes.

    Args:
        seq_len: global sequence length L.
        batch_size: sequences B per sequence group and step.
        num_workers: number of loading processes per rank.

    Raises:
        ValueError: if a size is not positive; in ``setup``, if a split is too short for one sample, or the training
            split for one batch; from the loaders, if ``num_workers`` is negative.
    """

    vocab_size: int = 256
    bytes_per_token: float = 1.0
    collate_fn: Callable[[list[Sample]], dict[str, Any]] | None = (
        None  # makes a batch of samples; None: of their tensors
    )

    def __init__(self, seq_len: int, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        check_positive(seq_len=seq_len, batch_size=batch_size)
        self.seq_len, self.batch_size, self.num_workers = seq_len, batch_size, num_workers
        self.datasets: dict[Split, SampleDataset] = {}

    @classmethod
    def example_batch(cls, seq_len: int, batch_size: int) -> Sample:
        """A batch of the loaders' shapes and dtypes, without contents, for the planner: on the meta device."""
        return {
            name: torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta") for name in ("inputs", "targets")
        }

    @abstractmethod
    def dataset(self, split: Split) -> SampleDataset:
        """Return the samples of one split."""

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets of ``stage``: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; None makes all."""
        splits = [split for split, stages in _STAGES.items() if stage is None or stage in stages]
        self.datasets |= {split: self.dataset(split) for split in splits}
        if "train" in self.datasets and len(self.datasets["train"]) < self.batch_size:
            raise ValueError(
                f"The train split has {len(self.datasets['train'])} samples of seq_len={self.seq_len}, fewer than "
                f"batch_size={self.batch_size}, so there would be no training step. Use a smaller batch_size or seq_len, or more data."
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the training samples, shuffled; an incomplete last batch is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation samples in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test samples in order."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def _loader(self, split: Split) -> DataLoader[Sample]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,  # by name, because Lightning passes another when it rebuilds the loader for prediction
            shuffle=split == "train",
            drop_last=split == "train",
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
