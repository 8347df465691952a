"""A file from a zip archive on the web: downloaded once per machine, verified, and never visible half-written."""

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
class ZipSource:
    """An archive on the web and the one file (member) wanted from it, with the size and SHA-256 of both."""

    url: str  # http or https
    zip_bytes: int
    zip_sha256: str  # hexadecimal digits
    member: str  # its name in the archive
    member_bytes: int
    member_sha256: str

    @property
    def zip_name(self) -> str:
        """The archive's name on disk."""
        return f"{self.member}.zip"

    def is_unpacked_at(self, path: Path) -> bool:
        """Return whether ``path`` is the member, judged by its size."""
        return path.is_file() and path.stat().st_size == self.member_bytes


def locate(source: ZipSource, path: Path) -> Path:
    """Return the file or archive of ``source`` at ``path``, which is one of the two or a folder that holds one.

    Only sizes are compared: hashing 100 MB at every start would be slow. :func:`fetch` hashes the archive.

    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if what is there has neither's size.
    """
    candidates = [path / source.member, path / source.zip_name] if path.is_dir() else [path]
    existing = [candidate for candidate in candidates if candidate.is_file()]
    if not existing:
        raise FileNotFoundError(f"{' and '.join(map(str, candidates))} do{'' if path.is_dir() else 'es'} not exist.")
    for candidate in existing:
        if candidate.stat().st_size in (source.member_bytes, source.zip_bytes):
            return candidate
    sizes = " and ".join(f"{candidate} has {candidate.stat().st_size} bytes" for candidate in existing)
    raise ValueError(
        f"{sizes}, but {source.member} has {source.member_bytes} and {source.zip_name} {source.zip_bytes}. It is "
        "another file or an incomplete copy: copy it again."
    )


def fetch(source: ZipSource, folder: Path, archive: Path | None = None) -> Path:
    """Return the path of the member in ``folder``; unpack it first if it is not there.

    It is unpacked from ``archive``, or else from ``folder``'s archive, which is downloaded if missing or damaged. One
    process at a time does this in a folder; the others wait and then find the file.

    Raises:
        DownloadError: if the download fails; the message says where to put a copy.
        ValueError: if ``archive`` or what it contains has the wrong SHA-256.
    """
    target = folder / source.member
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{source.member}.lock"):  # pooch itself has no lock
        if not source.is_unpacked_at(target):  # otherwise another process was first
            if archive is None:
                archive = _download(source, folder)
            elif pooch.file_hash(archive) != source.zip_sha256:
                raise ValueError(f"{archive} is damaged: its SHA-256 is not {source.zip_sha256}. Copy it again.")
            _unpack(source, archive, target)
    return target


def _download(source: ZipSource, folder: Path) -> Path:
    """Return the archive in ``folder``; download it first if it is missing or damaged.

    pooch writes to a temporary file, which it renames once the SHA-256 is right and removes otherwise.
    """
    name = source.zip_name
    # pooch waits 1 s before the first retry and 2 s before the second.
    files = pooch.create(folder, "", registry={name: source.zip_sha256}, urls={name: source.url}, retry_if_failed=2)
    try:
        return Path(files.fetch(name, downloader=pooch.HTTPDownloader(progressbar=True)))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        raise DownloadError(
            f"{source.url} could not be downloaded ({error}). Try again, or give another address with data.url=... "
            f"Without a network, put a complete {name} or the unpacked {source.member} into {folder}, or name a copy "
            "with data.path=..."
        ) from error


def _unpack(source: ZipSource, archive: Path, target: Path) -> None:
    """Write the member of a verified archive to ``target``, or nothing and raise ``ValueError`` if its hash is wrong."""
    part = target.with_name(f"{target.name}.part")  # a fixed name: the next call overwrites what a killed one left
    with zipfile.ZipFile(archive) as container, container.open(source.member) as packed, part.open("wb") as file:
        shutil.copyfileobj(packed, file)
        file.flush()
        os.fsync(file.fileno())  # later runs look at the size only, so the bytes must be on disk before the name is
    if pooch.file_hash(part) != source.member_sha256:
        part.unlink()
        raise ValueError(f"{source.member} in {archive} is another file: its SHA-256 is not {source.member_sha256}.")
    os.replace(part, target)
