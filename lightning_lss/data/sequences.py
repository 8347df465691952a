"""What the data modules share: tokens on disk, samples cut from them, and the loaders."""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Split = Literal["train", "val", "test"]
Sample = dict[str, Tensor]

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


class TokenFiles:
    """The tokens of one or several files, laid end to end as one stream.

    Reading maps only the piece that is asked for, so the files may be larger than memory, and an object of this class
    holds paths and sizes only: sent to the workers of a DataLoader it takes no data along.

    Args:
        paths: the files, in the order of the stream.
        dtype: the type of a token in the files, one of :data:`TOKEN_DTYPES`, in the byte order of this machine.

    Raises:
        ValueError: if ``dtype`` is unknown or the size of a file is no multiple of a token's.
        OSError: if a file cannot be found.
    """

    def __init__(self, paths: Sequence[Path], dtype: str = "uint8") -> None:
        if dtype not in TOKEN_DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: choose one of {', '.join(map(repr, TOKEN_DTYPES))}.")
        self.dtype = np.dtype(dtype)
        sizes = {path: _tokens_in(path, self.dtype) for path in paths}
        self.paths = [path for path in paths if sizes[path]]  # an empty file cannot be mapped
        self._starts = [0, *itertools.accumulate(sizes[path] for path in self.paths)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` (exclusive) of the stream, int64 [stop - start].

        Raises:
            IndexError: if they are not all in the stream.
        """
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"Tokens {start} to {stop} are not in a stream of {len(self)}.")
        first = bisect.bisect_right(self._starts, start) - 1
        last = bisect.bisect_left(self._starts, stop) - 1
        pieces = [self._read_file(file, start, stop) for file in range(first, last + 1)]
        return torch.from_numpy(np.concatenate(pieces, dtype=np.int64))

    def _read_file(self, file: int, start: int, stop: int) -> np.ndarray:
        """The part of ``start`` to ``stop`` that lies in one file."""
        begin, end = max(start, self._starts[file]), min(stop, self._starts[file + 1])
        offset = (begin - self._starts[file]) * self.dtype.itemsize
        return np.memmap(self.paths[file], self.dtype, mode="r", offset=offset, shape=(end - begin,))


def _tokens_in(path: Path, dtype: np.dtype) -> int:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, no multiple of the {dtype.itemsize} bytes of a token of dtype={dtype.name!r}. "
            "Give the dtype with which the file was written."
        )
    return size // dtype.itemsize


class SampleDataset(Dataset[Sample], ABC):
    """A map-style dataset of samples ``{"inputs": int64 [L], "targets": int64 [L]}``, targets shifted already."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...


class WindowDataset(SampleDataset):
    """Windows of a token stream: sample i is made of its tokens i*L to i*L + L + 1, so no two share a target.

    Args:
        tokens: the stream.
        seq_len: length L of a sample.
        vocab_size: every token must be in [0, vocab_size).
        span: the part of the stream to use; None for all of it.
        name: what error messages call that part.

    Raises:
        ValueError: if the part is shorter than L + 1; on reading, if a token is out of range.
    """

    def __init__(
        self, tokens: TokenFiles, seq_len: int, vocab_size: int, span: range | None = None, name: str = "text"
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.span = range(len(tokens)) if span is None else span
        if len(self.span) < seq_len + 1:
            raise ValueError(
                f"The {name} holds {len(self.span)} tokens, fewer than the seq_len + 1 = {seq_len + 1} of one sample. "
                f"Use a seq_len of at most {max(0, len(self.span) - 1)}, or more text."
            )

    def __len__(self) -> int:
        return (len(self.span) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Sample {index} does not exist: there are {len(self)}.")
        start = self.span.start + index * self.seq_len
        tokens = self.tokens.read(start, start + self.seq_len + 1)  # [L + 1]
        least, most = (int(x) for x in tokens.aminmax())
        if least < 0 or most >= self.vocab_size:  # else the embedding fails, on CUDA without saying why
            raise ValueError(
                f"Tokens {start} to {start + self.seq_len} range from {least} to {most}, outside of "
                f"[0, {self.vocab_size}). Give the vocab_size and dtype with which the text was written."
            )
        return {"inputs": tokens[:-1], "targets": tokens[1:]}


def spans_by_position(length: int, shares: Sequence[float]) -> dict[Split, range]:
    """Cut a stream of ``length`` tokens in three: training first, then validation, then test.

    Raises:
        ValueError: unless ``shares`` are three positive numbers that sum to 1.
    """
    if len(shares) != 3 or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"splits={tuple(shares)} must be three positive shares, of training, validation and test, that sum to 1."
        )
    val, test = (round(length * share) for share in (shares[0], shares[0] + shares[1]))
    return {"train": range(val), "val": range(val, test), "test": range(test, length)}


class SequenceDataModule(pl.LightningDataModule, ABC):
    """Loaders of batches ``{"inputs": int64 [B, L], "targets": int64 [B, L]}``; prediction runs on the test split.

    Loaders are plain ones, in which Lightning puts a sampler by the strategy's data rank. A subclass sets what differs
    from ``vocab_size = 256`` and ``bytes_per_token = 1.0``, those of bytes, and says what a split consists of.

    Args:
        seq_len: global sequence length L.
        batch_size: sequences B per sequence group and step.
        num_workers: processes that load ahead, per rank.

    Raises:
        ValueError: if a number is out of range; in ``setup``, if a split is too short.
    """

    vocab_size: int = 256
    bytes_per_token: float = 1.0

    def __init__(self, seq_len: int, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.datasets: dict[Split, SampleDataset] = {}

    @abstractmethod
    def dataset(self, split: Split) -> SampleDataset:
        """The samples of one split."""

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets that ``stage`` needs: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"``, None for
        all."""
        for split in _SPLITS_OF_STAGE[stage]:
            self.datasets[split] = self.dataset(split)
        if "train" in self.datasets and len(self.datasets["train"]) < self.batch_size:
            raise ValueError(
                f"The train split has {len(self.datasets['train'])} samples of seq_len={self.seq_len}, fewer than "
                f"batch_size={self.batch_size}, so there would be no training step. Use a smaller batch_size or seq_len, or more data."
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled; a last batch that is not full is left out."""
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """In order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """In order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        """The test split, in order."""
        return self._loader("test")

    def _loader(self, split: Split, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,  # by name, as Lightning gives another when it rebuilds the loader to predict
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
