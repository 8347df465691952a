"""enwik8, the paper's data (arXiv 2311.02382): the first 100 MB of a dump of the English Wikipedia."""

from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import pooch

from lightning_lss.data.download import ZippedFile
from lightning_lss.data.sequences import SequenceDataModule, Split, TokenFiles, WindowDataset, spans_by_position

ENWIK8 = ZippedFile(
    url="http://mattmahoney.net/dc/enwik8.zip",
    zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    name="enwik8",
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)


class Enwik8DataModule(SequenceDataModule):
    """enwik8 as bytes: the first 90 MB for training, the next 5 MB for validation, the last 5 MB for test.

    ``prepare_data`` downloads the archive (36 MB) once and unpacks it; both stay in ``cache_dir``.

    Args:
        path: a copy on disk: the file, its zip archive, or a folder that holds one of them; None to download it.
        cache_dir: where the download is kept; None for ``lightning_lss/enwik8`` in the user's cache folder
            (``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux, ``~/Library/Caches`` on macOS).
        url: another http or https address of the same archive.
        source: the archive's address and the hashes to expect.
        seq_len, batch_size, num_workers: as in :class:`~lightning_lss.data.sequences.SequenceDataModule`.

    Raises:
        FileNotFoundError: if there is nothing at ``path``; in ``setup``, if ``prepare_data`` did not run.
        ValueError: if what is at ``path`` is another file or incomplete.
        DownloadError: in ``prepare_data``, if the download fails; the message says where to put a copy.
    """

    def __init__(
        self,
        seq_len: int,
        batch_size: int,
        path: str | Path | None = None,
        cache_dir: str | Path | None = None,
        url: str | None = None,
        num_workers: int = 0,
        source: ZippedFile = ENWIK8,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        self.source = source if url is None else replace(source, url=url)
        self.cache_dir = Path(cache_dir or pooch.os_cache("lightning_lss") / "enwik8").expanduser()
        self.copy = None if path is None else source.find(Path(path).expanduser())
        self.text_path = self.cache_dir / source.name  # prepare_data makes it if it is not there
        if self.copy is not None and not is_zipfile(self.copy):
            self.text_path = self.copy

    def prepare_data(self) -> None:
        """Download and unpack the file if needed. Lightning calls this on one rank per node."""
        if self.text_path != self.copy:
            self.source.fetch(self.cache_dir, archive=self.copy)

    def dataset(self, split: Split) -> WindowDataset:
        """Return windows of the part of the file that belongs to ``split``."""
        if not self.text_path.is_file():
            raise FileNotFoundError(f"{self.text_path} is missing. Call prepare_data() first.")
        tokens = TokenFiles([self.text_path])
        span = spans_by_position(len(tokens), (0.9, 0.05, 0.05))[split]  # the customary 90, 5 and 5 million bytes
        return WindowDataset(tokens, self.seq_len, self.vocab_size, span, f"{split} split")
