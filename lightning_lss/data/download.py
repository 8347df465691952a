"""A file in a zip archive on the web: downloaded once per machine, verified, and never visible half-written."""

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock


class DownloadError(RuntimeError):
    """A file could not be downloaded, or the server sent another one."""


@dataclass(frozen=True)
class ZippedFile:
    """A file in a zip archive on the web; the SHA-256 of both, in hexadecimal digits, tells them from other files."""

    url: str  # http or https
    zip_sha256: str
    name: str  # in the archive, and on disk; the archive's own ends in .zip
    sha256: str

    def is_unpacked_at(self, path: Path) -> bool:
        """Return whether ``path`` is the file."""
        return path.is_file() and pooch.file_hash(path) == self.sha256

    def find(self, path: Path) -> Path:
        """Return the file or its archive at ``path``, which is one of the two or a folder that holds one.

        Raises:
            FileNotFoundError: if neither is there.
            ValueError: if what is there has another SHA-256.
        """
        candidates = [path / self.name, path / f"{self.name}.zip"] if path.is_dir() else [path]
        existing = {file: pooch.file_hash(file) for file in candidates if file.is_file()}
        if not existing:
            raise FileNotFoundError(f"There is no file {' or '.join(map(str, candidates))}.")
        for file, sha256 in existing.items():
            if sha256 in (self.sha256, self.zip_sha256):
                return file
        raise ValueError(
            f"{' and '.join(f'{file} has the SHA-256 {sha256}' for file, sha256 in existing.items())}, but {self.name} has"
            f" {self.sha256} and {self.name}.zip {self.zip_sha256}. It is another file or an incomplete copy: copy it again."
        )

    def fetch(self, folder: Path, archive: Path | None = None) -> None:
        """Unpack the file into ``folder`` unless it is there: from ``archive``, or else from ``folder``'s, which is
        downloaded if missing or damaged.

        One process at a time does this in a folder; the others wait and then find the file.

        Raises:
            DownloadError: if the download fails; the message says where to put a copy.
            ValueError: if the archive contains another file.
        """
        target, part = folder / self.name, folder / f"{self.name}.part"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{self.name}.lock"):  # pooch itself has no lock
            if self.is_unpacked_at(target):
                return
            archive = archive or self._download(folder)
            with zipfile.ZipFile(archive) as container, container.open(self.name) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file)
            if not self.is_unpacked_at(part):
                part.unlink()
                raise ValueError(f"{self.name} in {archive} is another file: its SHA-256 is not {self.sha256}.")
            os.replace(part, target)

    def _download(self, folder: Path) -> Path:
        """Return the archive in ``folder``, which pooch writes to a temporary file until its SHA-256 is right."""
        name = f"{self.name}.zip"
        # pooch waits 1 s before the first retry and 2 s before the second.
        files = pooch.create(folder, "", registry={name: self.zip_sha256}, urls={name: self.url}, retry_if_failed=2)
        try:
            return Path(files.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True)))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
            raise DownloadError(
                f"{self.url} could not be downloaded ({error}). Try again, or give another address with data.url=... Without"
                f" a network, put a complete {name} or the unpacked {self.name} into {folder}, or name a copy with"
                " data.path=..."
            ) from error
