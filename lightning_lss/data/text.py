"""Any text or token file, or a folder of them."""

from collections.abc import Sequence
from pathlib import Path

from lightning_lss.data.sequences import SequenceDataModule, Split, TokenFiles, WindowDataset, spans_by_position


class TextDataModule(SequenceDataModule):
    """A file, or a folder's files joined in the order of their names, split by position: training comes first.

    Args:
        path: the file or folder. Hidden files and folders in it are ignored.
        dtype: ``"uint8"`` for bytes; ``"uint16"``, ``"uint32"``, ``"int32"`` or ``"int64"`` for raw token files.
        splits: shares of training, validation and test.
        vocab_size: number of token values; None means 256 and is allowed for bytes only.
        bytes_per_token: mean number of bytes of text in a token.
        pattern: a glob for the files of a folder; ``**`` stands for any number of folders.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if no file in the folder matches, a file's size is not a multiple of a token's, ``vocab_size`` is
            missing, or a number is out of range; on reading, if a token is not in [0, vocab_size).
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
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        self.tokens = TokenFiles(_find_files(Path(path).expanduser(), pattern), dtype)
        self.spans = spans_by_position(len(self.tokens), splits)
        if vocab_size is None and dtype != "uint8":
            raise ValueError(f"vocab_size is required with dtype={dtype!r}: give the number of token values.")
        self.vocab_size = 256 if vocab_size is None else vocab_size
        self.bytes_per_token = bytes_per_token
        if self.vocab_size < 1 or bytes_per_token <= 0:
            raise ValueError(f"vocab_size={vocab_size} and bytes_per_token={bytes_per_token} must be positive.")

    def dataset(self, split: Split) -> WindowDataset:
        """Return windows of the part of the stream that belongs to ``split``."""
        return WindowDataset(self.tokens, self.seq_len, self.vocab_size, self.spans[split], f"{split} split")


def _find_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} does not exist. Give a file or a folder (data.path=...).")
    found = {file.relative_to(path) for file in path.glob(pattern) if file.is_file()}
    names = sorted(name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts))
    if not names:
        raise ValueError(f"The folder path={str(path)!r} holds no file that matches pattern={pattern!r}.")
    return [path / name for name in names]
