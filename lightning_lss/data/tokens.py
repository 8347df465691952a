"""Texts as the tokens of a tokenizer: made once, and kept in memory-mapped files."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lss.data.cache import cache_folder, made_once
from lightning_lss.data.documents import Documents, PackedDataset, Piece, collate_packed
from lightning_lss.data.files import find_files, is_compressed
from lightning_lss.data.sequences import SequenceDataModule, Split, WindowDataset, spans_by_position
from lightning_lss.data.tokenizer import AUTO, PIECE, TokenizerFile, read_text

_VERSION = 1  # of what is written to the cache


class TokenizedDataModule(SequenceDataModule):
    """Sequences of documents that are tokenized once. A subclass says what the documents of each split are.

    With ``packed``, a batch also has ``mask``, an :class:`~lightning_lss.AttentionMask`, and ``position_ids``, int64 [B, L]:
    no token sees another document, and positions begin anew in each. A document's last token then has no target.

    Args:
        tokenizer: the tokenizer; None if the documents are token ids already.
        vocab_size: number of token values.
        splits: shares of training, validation and test, where the documents are not split already.
        packed: whether a batch says which document a token is of.
        cache_dir: where tokens are kept; None for ``lightning_lss/tokens`` in the user's cache folder.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.
    """

    vocab_size: int = 0  # that of an object follows from its tokenizer

    def __init__(
        self,
        seq_len: int,
        batch_size: int,
        tokenizer: TokenizerFile | None,
        vocab_size: int,
        splits: Sequence[float],
        packed: bool,
        cache_dir: str | Path | None,
        num_workers: int,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        spans_by_position(0, splits)  # refuses wrong shares
        self.tokenizer, self.vocab_size, self.splits, self.packed = tokenizer, vocab_size, splits, packed
        self.cache_dir = cache_folder(cache_dir, "tokens")
        self.collate_fn = collate_packed if packed else None

    @cached_property
    @abstractmethod
    def documents(self) -> dict[Split, Documents]:
        """The documents of each split; if all share them, they are split by position. They are made if they are not there."""

    @property
    def bytes_per_token(self) -> float:  # type: ignore[override]  # it is known once the text was read
        """Mean number of bytes of the training text in a token."""
        return self.documents["train"].bytes_per_token

    def prepare_data(self) -> None:
        """Tokenize unless that was done. Lightning calls this on one rank per node."""
        _ = self.documents

    def dataset(self, split: Split) -> WindowDataset:
        """Return windows of the documents that belong to ``split``."""
        mine = self.documents[split]
        span = range(len(mine.tokens))
        if all(documents is mine for documents in self.documents.values()):
            span = spans_by_position(len(span), self.splits)[split]
        options = (self.seq_len, self.vocab_size, span, f"{split} split")
        return PackedDataset(mine, *options) if self.packed else WindowDataset(mine.tokens, *options)

    def make(self, sources: Sequence[Path], kind: str, pieces: Iterator[Piece]) -> Documents:
        """Return the documents that are made of the content of ``sources``, which ``pieces`` reads only if they are not kept."""
        tokenizer = [] if self.tokenizer is None else [self.tokenizer.file]
        end = None if self.tokenizer is None else self.tokenizer.end
        choices = {"kind": kind, "end": end, "vocab_size": self.vocab_size, "piece": PIECE, "version": _VERSION}

        def write(folder: Path) -> None:
            rank_zero_info(
                f"Making tokens of {len(sources)} files ({sources[0]}, ...), which are kept in {self.cache_dir}."
            )
            Documents.write(folder, pieces, self.vocab_size)

        return Documents(made_once(self.cache_dir, [*tokenizer, *sources], choices, write))


class TokensDataModule(TokenizedDataModule):
    """Text files and a tokenizer: each file is a document, and their tokens, joined, are split by position.

    The files are texts in UTF-8, also compressed with gzip, bzip2 or xz. They are tokenized once, into files of uint16 (up
    to 65,536 tokens in the vocabulary) or uint32, which belong to the content of the texts and of the tokenizer.

    Args:
        path: a file, or a folder whose files are read in the order of their names. Hidden ones are ignored.
        tokenizer: a file ``tokenizer.json`` of Hugging Face's ``tokenizers``, or a checkpoint's folder with one.
        pattern: a glob for the files of a folder; ``**`` stands for any number of folders.
        splits: shares of training, validation and test.
        end_token: the token after each document; ``"auto"`` for the one that the tokenizer's ``tokenizer_config.json``
            calls ``eos_token``, none if there is none; None for none.
        packed: whether a batch has ``mask`` and ``position_ids``, so that no token sees another document.
        cache_dir: where tokens are kept; None for ``lightning_lss/tokens`` in the user's cache folder.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        MissingPackageError: if ``tokenizers`` is not installed.
        FileNotFoundError: if there is nothing at ``path``, or no tokenizer.
        ValueError: if no file in the folder matches, one is packed in another way, or the tokenizer's file is not one; when
            the files are first read, if one is damaged or not UTF-8.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        seq_len: int,
        batch_size: int,
        pattern: str = "**/*",
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        end_token: str | None = AUTO,
        packed: bool = False,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
    ) -> None:
        self.files = find_files(path, pattern)
        for file in self.files:
            is_compressed(file)  # refuses what cannot be unpacked
        reader = TokenizerFile(tokenizer, end_token)
        super().__init__(seq_len, batch_size, reader, reader.vocab_size, splits, packed, cache_dir, num_workers)

    @cached_property
    def documents(self) -> dict[Split, Documents]:
        """The files; each is a document."""
        assert self.tokenizer is not None
        pieces = self.tokenizer.encode(chain.from_iterable(map(read_text, self.files)))
        documents = self.make(self.files, "text files", pieces)
        return {"train": documents, "val": documents, "test": documents}
