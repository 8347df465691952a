"""The default data: the source of Python's standard library. It needs no download."""

import os
import sysconfig
from pathlib import Path

from lightning_lss.data.sequences import SequenceDataModule, Split, TokenFiles, WindowDataset

MIN_FILES = 200  # a full library has more than 600
# Other packages; tests, which are as much as all the rest together; one generated file, larger than a split.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
_OF_EVERY_20: dict[int, Split] = {18: "val", 19: "test"}  # files by their place; the others are for training


class StdlibDataModule(SequenceDataModule):
    """About 11 MB of Python source, as bytes: the running interpreter's standard library, without its tests.

    Of every 20 files, in the order of their paths, 18 are for training, one for validation and one for test, so the
    splits are alike and share no file. The text, and with it the loss, depends on the version of Python: compare only
    runs with the same one. The arguments are those of :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        FileNotFoundError: if the interpreter comes without its library's source.
    """

    def __init__(self, seq_len: int, batch_size: int, num_workers: int = 0) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        self.files = _find_sources(Path(sysconfig.get_path("stdlib")))

    def dataset(self, split: Split) -> WindowDataset:
        """Return windows of the files of ``split``, joined end to end."""
        files = [file for index, file in enumerate(self.files) if _OF_EVERY_20.get(index % 20, "train") == split]
        return WindowDataset(TokenFiles(files), self.seq_len, self.vocab_size, name=f"{split} split")


def _find_sources(root: Path) -> list[Path]:
    """Return all source files below ``root`` that are not left out, sorted by path."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    if len(names) < MIN_FILES:
        raise FileNotFoundError(
            f"{root} holds {len(names)} source files of Python's standard library, fewer than {MIN_FILES}: this "
            "interpreter comes without them (zipped or stripped). Use a text of your own: data=text data.path=..."
        )
    return [root / name for name in sorted(names)]
