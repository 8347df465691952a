"""A folder that Hugging Face's ``datasets`` saved."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_lss.data.documents import Documents, Piece
from lightning_lss.data.optional import require
from lightning_lss.data.sequences import Split
from lightning_lss.data.tokenizer import AUTO, TokenizerFile, in_pieces
from lightning_lss.data.tokens import TokenizedDataModule
from lightning_lss.sequence.layout import check_positive

_ROWS = 1000  # that are read at once
_NAMES: dict[Split, tuple[str, ...]] = {  # of splits in a folder, by preference
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev", "test"),
    "test": ("test", "validation", "valid", "val", "dev"),
}


class DatasetDataModule(TokenizedDataModule):
    """A folder of ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``: each row is a document.

    The rows of one dataset are split by position. Of several, ``train`` is for training, ``validation`` for validation and
    ``test`` for test; where only one of the last two is there, it is for both; where only ``train`` is, it is split by
    position.

    Args:
        path: the folder.
        column: the column with texts, or with lists of token ids, which are taken as they are.
        tokenizer: a file ``tokenizer.json`` of Hugging Face's ``tokenizers``, or a checkpoint's folder with one; None if the
            column has token ids.
        vocab_size: number of token values; None for the tokenizer's.
        bytes_per_token: mean number of bytes of text in a token; None to count them, or for 1 if the column has token ids.
        splits: shares of training, validation and test.
        end_token: the token after each text, as in :class:`~lightning_lss.data.TokensDataModule`; not after token ids.
        packed: whether a batch has ``mask`` and ``position_ids``, so that no token sees another document.
        cache_dir: where tokens are kept; None for ``lightning_lss/tokens`` in the user's cache folder.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        MissingPackageError: if ``tokenizers`` or, when the rows are first read, ``datasets`` is not installed.
        FileNotFoundError: if there is nothing at ``path``, or no tokenizer.
        ValueError: if the folder is not a dataset's, or there is neither ``tokenizer`` nor ``vocab_size``; when the rows are
            first read, if there is no such column, or it has something else than texts or token ids.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        batch_size: int,
        column: str = "text",
        tokenizer: str | Path | None = None,
        vocab_size: int | None = None,
        bytes_per_token: float | None = None,
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        end_token: str | None = AUTO,
        packed: bool = False,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
    ) -> None:
        self.folders, self.column, self._bytes_per_token = _find(Path(path).expanduser()), column, bytes_per_token
        reader = None if tokenizer is None else TokenizerFile(tokenizer, end_token)
        if reader is None and vocab_size is None:
            raise ValueError(
                "A dataset needs data.tokenizer=... if the column has texts, or data.vocab_size=... if it has token ids."
            )
        if vocab_size is None:
            assert reader is not None
            vocab_size = reader.vocab_size
        check_positive(vocab_size=vocab_size)
        super().__init__(seq_len, batch_size, reader, vocab_size, splits, packed, cache_dir, num_workers)

    @cached_property
    def documents(self) -> dict[Split, Documents]:
        """The rows of each split."""
        made = {folder: self._make(folder) for folder in set(self.folders.values())}
        return {split: made[folder] for split, folder in self.folders.items()}

    @property
    def bytes_per_token(self) -> float:  # type: ignore[override]
        """Mean number of bytes of the training text in a token."""
        return self._bytes_per_token or super().bytes_per_token or 1.0  # token ids have no bytes

    def _make(self, folder: Path) -> Documents:
        return self.make(_data_files(folder), f"column {self.column}", self._pieces(folder))

    def _pieces(self, folder: Path) -> Iterator[Piece]:
        dataset = require("datasets", "A folder of datasets").load_from_disk(str(folder)).with_format(None)
        if self.column not in dataset.column_names:
            raise ValueError(
                f"{folder} has no column {self.column!r} (data.column=...). It has {', '.join(map(repr, dataset.column_names))}."
            )
        batches = dataset.select_columns([self.column]).iter(_ROWS)
        rows = (row for batch in batches for row in batch[self.column])
        if not isinstance(next(iter(dataset[:1][self.column]), []), str):
            yield from (Piece(self._ids(row, index), 0, True) for index, row in enumerate(rows))
        elif self.tokenizer is None:
            raise ValueError(
                f"Column {self.column!r} of {folder} has texts: add the tokenizer for them (data.tokenizer=...)."
            )
        else:
            texts = (in_pieces([self._text(row, index)]) for index, row in enumerate(rows))
            yield from self.tokenizer.encode(chain.from_iterable(texts))

    def _text(self, row: Any, index: int) -> str:
        if not isinstance(row, str):
            raise ValueError(f"Row {index} of column {self.column!r} is {row!r}, not a text: leave such rows out.")
        return row

    def _ids(self, row: Any, index: int) -> Sequence[int]:
        if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
            raise ValueError(
                f"Row {index} of column {self.column!r} is neither a text nor a list of token ids: name another"
                " (data.column=...), or leave such rows out."
            )
        return row


def _find(path: Path) -> dict[Split, Path]:
    """Return the folder of each split's dataset."""
    if (several := path / "dataset_dict.json").is_file():
        names = json.loads(several.read_text())["splits"]
    elif (path / "state.json").is_file():
        return dict.fromkeys(_NAMES, path)
    elif path.exists():
        raise ValueError(f"path={str(path)!r} is not a dataset's folder: save one with dataset.save_to_disk(folder).")
    else:
        raise FileNotFoundError(f"path={str(path)!r} does not exist. Give the folder of a dataset (data.path=...).")
    if "train" not in names:
        raise ValueError(
            f"The datasets in {path} are {', '.join(names)}: one must be called train, or give its own folder."
        )
    chosen = {split: next((name for name in own if name in names), "train") for split, own in _NAMES.items()}
    return {split: path / name for split, name in chosen.items()}


def _data_files(folder: Path) -> list[Path]:
    """Return the files that hold the rows."""
    return [folder / file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
