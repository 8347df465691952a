"""Any text or token file, or a folder of them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from lightning_lss.data.cache import unpacked
from lightning_lss.data.files import find_files, is_compressed
from lightning_lss.data.sequences import SequenceDataModule, Split, TokenFiles, WindowDataset, spans_by_position


class TextDataModule(SequenceDataModule):
    """A file, or a folder's files joined in the order of their names, split by position: training comes first.

    Files compressed with gzip, bzip2 or xz are recognized by their first bytes (token files by their names too) and unpacked
    once, into ``cache_dir``; other compressed files and archives are refused.

    Args:
        path: the file or folder. Hidden files and folders in it are ignored.
        dtype: ``"uint8"`` for bytes; ``"uint16"``, ``"uint32"``, ``"int32"`` or ``"int64"`` for raw token files.
        splits: shares of training, validation and test.
        vocab_size: number of token values; None means 256 and is allowed for bytes only.
        bytes_per_token: mean number of bytes of text in a token.
        pattern: a glob for the files of a folder; ``**`` stands for any number of folders.
        cache_dir: where unpacked files are kept; None for ``lightning_lss/unpacked`` in the user's cache folder.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if no file in the folder matches, a file is packed in another way, a file's size is not a multiple of a
            token's, ``vocab_size`` is missing, or a number is out of range; on reading, if a token is not in [0, vocab_size),
            or a compressed file is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        seq_len: int,
        batch_size: int,
        dtype: str = "uint8",
        splits: Sequence[float] = (0.9, 0.05, 0.05),
        vocab_size: int | None = None,
        bytes_per_token: float = 1.0,
        pattern: str = "**/*",
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        self.files, self.dtype, self.splits, self.cache_dir = find_files(path, pattern), dtype, splits, cache_dir
        self.compressed = {file for file in self.files if is_compressed(file, by_name_too=dtype != "uint8")}
        spans_by_position(0 if self.compressed else len(self.tokens), splits)  # refuses what is wrong before a run
        if vocab_size is None and dtype != "uint8":
            raise ValueError(f"vocab_size is required with dtype={dtype!r}: give the number of token values.")
        self.vocab_size = 256 if vocab_size is None else vocab_size
        self.bytes_per_token = bytes_per_token
        if self.vocab_size < 1 or bytes_per_token <= 0:
            raise ValueError(f"vocab_size={vocab_size} and bytes_per_token={bytes_per_token} must be positive.")

    @cached_property
    def tokens(self) -> TokenFiles:
        """The stream of all files. What is compressed is unpacked if it is not yet."""
        files = [unpacked(file, self.cache_dir) if file in self.compressed else file for file in self.files]
        return TokenFiles(files, self.dtype)

    def prepare_data(self) -> None:
        """Unpack what is compressed. Lightning calls this on one rank per node."""
        _ = self.tokens

    def dataset(self, split: Split) -> WindowDataset:
        """Return windows of the part of the stream that belongs to ``split``."""
        span = spans_by_position(len(self.tokens), self.splits)[split]
        return WindowDataset(self.tokens, self.seq_len, self.vocab_size, span, f"{split} split")
