"""What is made of a user's files and kept: found by the content it was made of, made once per machine, never seen half-made."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pooch
from filelock import FileLock

from lightning_lss.data.files import read_blocks

_SETTLED = 2.0  # seconds after which a file that is written again has another time of change, on any file system


def cache_folder(cache_dir: str | Path | None, name: str) -> Path:
    """Return ``cache_dir``, or ``lightning_lss/<name>`` in the user's cache folder."""
    return Path(cache_dir or pooch.os_cache("lightning_lss") / name).expanduser()


def made_once(cache: Path, sources: Sequence[Path], choices: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Return the folder in ``cache`` that belongs to the content of ``sources`` and to ``choices``, plain values.

    ``make`` fills it, given its path, if it is not there. One process at a time does this; the others wait and find it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    content = [file_digest(path, cache) for path in sources]
    folder = cache / hashlib.sha256(json.dumps([content, choices], sort_keys=True).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            part = Path(f"{folder}.part")
            shutil.rmtree(part, ignore_errors=True)  # what a killed process left
            part.mkdir()
            make(part)
            os.replace(part, folder)
    return folder


def file_digest(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits.

    A note in ``cache`` keeps it as long as the file has the same path, size and time of change, so that large files are
    not read again by every rank of every run.
    """
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    note = cache / "digests" / hashlib.sha256(state.encode()).hexdigest()
    if note.is_file():
        return note.read_text()
    started = time.time()
    digest = pooch.file_hash(path)
    if started - stat.st_mtime > _SETTLED:
        note.parent.mkdir(exist_ok=True)
        part = note.with_name(f"{note.name}.{os.getpid()}.{threading.get_ident()}")
        part.write_text(digest)
        os.replace(part, note)
    return digest


def unpacked(path: Path, cache_dir: str | Path | None = None) -> Path:
    """Return the unpacked copy of a compressed file, in ``cache_dir`` or the user's cache folder.

    Raises:
        ValueError: if the file is damaged or incomplete, or packed in a way that Python's standard library cannot unpack.
    """

    def unpack(folder: Path) -> None:
        with (folder / "unpacked").open("wb") as file:
            for block in read_blocks(path):
                file.write(block)

    return made_once(cache_folder(cache_dir, "unpacked"), [path], {}, unpack) / "unpacked"
