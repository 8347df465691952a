"""A file out of a zip archive on the web, downloaded once, verified and never left half-written."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

_TIMEOUT = 30.0  # seconds without an answer or without further data
_CHUNK = 1 << 20  # bytes


class DownloadError(RuntimeError):
    """A file could not be downloaded, or is not what it should be."""


@dataclass(frozen=True)
class ZipSource:
    """An archive on the web and the one file in it that is wanted.

    Args:
        url: where the archive is.
        zip_bytes, zip_sha256: its size, and its SHA-256 in hexadecimal digits.
        member: the name of the file in it.
        member_bytes, member_sha256: size and SHA-256 of that file.
    """

    url: str
    zip_bytes: int
    zip_sha256: str
    member: str
    member_bytes: int
    member_sha256: str

    @property
    def zip_name(self) -> str:
        """The name of the archive on disk."""
        return f"{self.member}.zip"


def locate(source: ZipSource, path: Path) -> Path:
    """The file of ``source`` or its archive at ``path``, which may be either, or a folder that holds one of them.

    Only sizes are compared; hashes are, when an archive is unpacked.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file has another size than both.
    """
    candidates = [path / source.member, path / source.zip_name] if path.is_dir() else [path]
    existing = [candidate for candidate in candidates if candidate.is_file()]
    if not existing:
        raise FileNotFoundError(f"There is no {' or '.join(map(str, candidates))}.")
    for candidate in existing:
        if candidate.stat().st_size in (source.member_bytes, source.zip_bytes):
            return candidate
    sizes = " and ".join(f"{candidate} has {candidate.stat().st_size} bytes" for candidate in existing)
    raise ValueError(
        f"{sizes}, but {source.member} has {source.member_bytes} and {source.zip_name} {source.zip_bytes}: not the "
        "right file, or only a part of it. Copy it again."
    )


def is_unpacked(source: ZipSource, path: Path) -> bool:
    """Whether ``path`` is the file itself, by its size."""
    return path.is_file() and path.stat().st_size == source.member_bytes


def fetch(source: ZipSource, folder: Path, archive: Path | None = None) -> Path:
    """The path of the file of ``source`` in ``folder``, made if it is not there yet.

    It is unpacked from ``archive`` or else from the archive in ``folder`` or else from the web. A download that broke
    off goes on where it stopped. One process at a time does this in a folder; others wait and find the file.

    Raises:
        DownloadError: if the download fails (the message says where to put a copy) or is not what it should be.
        ValueError: if an archive on disk is not what it should be.
    """
    target = folder / source.member
    if is_unpacked(source, target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{source.member}.lock"):
        if is_unpacked(source, target):  # another process was first
            return target
        local = folder / source.zip_name if archive is None else archive
        if local.is_file():
            if _sha256(local) != source.zip_sha256:
                raise ValueError(f"{local} is damaged: its SHA-256 is not {source.zip_sha256}. Copy it again.")
            _unpack(source, local, target)
        else:
            part = folder / f"{source.zip_name}.part"
            _download(source, part)
            _unpack(source, part, target)
            part.unlink()
    return target


def _download(source: ZipSource, part: Path) -> None:
    """Complete the archive at ``part`` and verify it."""
    try:
        _receive(source, part)
    except (OSError, HTTPException) as error:
        raise DownloadError(
            f"{source.url} could not be downloaded: {error!r}. Run again to go on where it stopped. Without a network, put "
            f"{source.zip_name} or the unpacked {source.member} into {part.parent}, or name a copy with data.path=..."
        ) from error
    size, digest = part.stat().st_size, _sha256(part)
    if size != source.zip_bytes or digest != source.zip_sha256:
        part.unlink()
        raise DownloadError(
            f"What {source.url} sent is not the file wanted and was removed: {size} bytes with SHA-256 {digest} "
            f"instead of {source.zip_bytes} bytes with {source.zip_sha256}. Run again for a fresh start, or give another url."
        )


def _receive(source: ZipSource, part: Path) -> None:
    """Download what is missing in ``part``; what has arrived stays there when the connection breaks.

    Raises:
        OSError, HTTPException: if it does.
    """
    have = part.stat().st_size if part.is_file() else 0
    if have == source.zip_bytes:
        return
    response = _resume(source, have) if 0 < have < source.zip_bytes else None
    if response is None:
        have, response = 0, urllib.request.urlopen(source.url, timeout=_TIMEOUT)
    progress = tqdm(
        total=source.zip_bytes, initial=have, unit="B", unit_scale=True, mininterval=1.0, desc=source.zip_name
    )
    with response, progress, part.open("ab" if have else "wb") as file:
        # read1 gives what has arrived, so the bar moves and a connection that breaks loses nothing.
        while have <= source.zip_bytes and (chunk := response.read1(_CHUNK)):
            file.write(chunk)
            have += len(chunk)
            progress.update(len(chunk))
    if have < source.zip_bytes:
        raise ConnectionError(f"the connection broke off after {have} of {source.zip_bytes} bytes")


def _resume(source: ZipSource, have: int) -> HTTPResponse | None:
    """A response with the archive from byte ``have`` on, or None if the server does not send exactly that."""
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: the archive there is shorter
            raise
        error.close()
        return None
    sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status == 206 and sent and int(sent[1]) == have and sent[2] in (str(source.zip_bytes), "*"):
        return response
    response.close()
    return None


def _unpack(source: ZipSource, archive: Path, target: Path) -> None:
    """Write the file of a verified archive to ``target``, whole or not at all."""
    part = target.with_name(f"{target.name}.part")
    with zipfile.ZipFile(archive) as container, container.open(source.member) as packed, part.open("wb") as file:
        while chunk := packed.read(_CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if not is_unpacked(source, part) or _sha256(part) != source.member_sha256:
        part.unlink()
        raise DownloadError(f"{source.member} in {archive} is not the file wanted: its size or SHA-256 differs.")
    os.replace(part, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
