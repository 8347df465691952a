"""enwik8, the paper's data (arXiv 2311.02382): the first 100 MB of a dump of the English Wikipedia."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pooch

from lightning_lss.data.download import ZipSource, fetch, is_unpacked, locate
from lightning_lss.data.sequences import (
    SampleDataset,
    SequenceDataModule,
    Split,
    TokenFiles,
    WindowDataset,
    spans_by_position,
)

ENWIK8 = ZipSource(
    url="http://mattmahoney.net/dc/enwik8.zip",
    zip_bytes=36_445_475,
    zip_sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    member="enwik8",
    member_bytes=100_000_000,
    member_sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
)
SHARES = (0.9, 0.05, 0.05)  # the customary 90, 5 and 5 million bytes


class Enwik8DataModule(SequenceDataModule):
    """enwik8 as bytes: the first 90 MB for training, the next 5 MB for validation, the last 5 MB for test.

    Batches are those of :class:`~lightning_lss.data.sequences.SequenceDataModule`. ``prepare_data`` downloads the
    archive (36 MB) once and unpacks it; both stay in ``cache_dir``.

    Args:
        seq_len: global sequence length L.
        batch_size: sequences B per sequence group and step.
        path: a copy on disk: the file, its zip archive, or a folder that holds one of them; None to download it.
        cache_dir: where the download is kept; None for ``lightning_lss/enwik8`` in the user's cache folder
            (``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux, ``~/Library/Caches`` on macOS).
        url: another http or https address of the same archive.
        num_workers: number of loading processes per rank.
        source: the archive's address, and the sizes and hashes to expect.

    Raises:
        FileNotFoundError: if there is nothing at ``path``; in ``setup``, if ``prepare_data`` did not run.
        ValueError: if the file at ``path`` has the wrong size, or a number is out of range; in ``prepare_data``, if
            the archive at ``path`` is damaged; in ``setup``, if a split is too short.
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
        source: ZipSource = ENWIK8,
    ) -> None:
        super().__init__(seq_len, batch_size, num_workers)
        self.source = source if url is None else dataclasses.replace(source, url=url)
        folder = pooch.os_cache("lightning_lss") / "enwik8" if cache_dir is None else Path(cache_dir)
        self.cache_dir = folder.expanduser()
        self.copy = None if path is None else locate(self.source, Path(path).expanduser())

    @property
    def text_path(self) -> Path:
        """The path of the unpacked file, which ``prepare_data`` makes if it is not there."""
        if self.copy is not None and is_unpacked(self.source, self.copy):
            return self.copy
        return self.cache_dir / self.source.member

    def prepare_data(self) -> None:
        """Download and unpack the file if needed. Lightning calls this on one rank per node."""
        if not is_unpacked(self.source, self.text_path):
            fetch(self.source, self.cache_dir, archive=self.copy)

    def dataset(self, split: Split) -> SampleDataset:
        """Return windows of the part of the file that belongs to ``split``."""
        if not is_unpacked(self.source, self.text_path):
            raise FileNotFoundError(f"{self.text_path} is missing or incomplete. Call prepare_data() first.")
        tokens = TokenFiles([self.text_path])
        span = spans_by_position(len(tokens), SHARES)[split]
        return WindowDataset(tokens, self.seq_len, self.vocab_size, span, f"{split} split")
