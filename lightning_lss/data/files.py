"""Files that users name: found in folders, recognized where they are compressed, and read block by block."""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK = 1 << 24  # bytes read at a time
_HEAD = 512  # bytes that tell a format: a tar archive's name for itself is at 257

_OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_FORMATS = {  # what the first bytes of a file are, and the program that unpacks it
    "gzip": (rb"\x1f\x8b\x08", "gunzip"),
    "bzip2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bunzip2"),
    "xz": (rb"\xfd7zXZ\0", "unxz"),
    "zip": (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "unzip"),
    "zstd": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "unzstd"),
    "lz4": (rb"\x04\x22\x4d\x18", "unlz4"),
    "7z": (rb"7z\xbc\xaf\x27\x1c", "7z x"),
    "rar": (rb"Rar!\x1a\x07", "unrar x"),
    "compress": (rb"\x1f[\x9d\xa0]", "uncompress"),
    "tar": (rb".{257}ustar", "tar -xf"),
}
_SUFFIXES = {".gz", ".bgz", ".bz2", ".xz", ".zip", ".zst", ".lz4", ".7z", ".rar", ".z", ".tar"}


def find_files(path: str | Path, pattern: str = "**/*", endings: tuple[str, ...] = ()) -> list[Path]:
    """Return the file at ``path``, or the files of the folder there that match, sorted by their paths.

    Hidden files and folders are left out. ``endings``, of lower-case names without what compression adds, hold for a folder
    only; () allows all.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if no file in the folder matches.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} does not exist. Give a file or a folder (data.path=...).")
    found = {file.relative_to(path) for file in path.glob(pattern) if file.is_file()}
    names = sorted(name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts))
    names = [name for name in names if not endings or _unpacked_name(name).endswith(endings)]
    if not names:
        what = (
            f"that ends in {', '.join(endings)}, compressed or not" if endings else f"that matches pattern={pattern!r}"
        )
        raise ValueError(f"The folder path={str(path)!r} holds no file {what}.")
    return [path / name for name in names]


def _unpacked_name(name: str) -> str:
    path = Path(name.lower())
    return str(path.with_suffix("")) if path.suffix in _SUFFIXES else str(path)


def is_compressed(path: Path, by_name_too: bool = False) -> bool:
    """Return whether :func:`read_blocks` unpacks the file, by its first bytes; ``by_name_too`` for files of numbers, which
    may begin with any bytes: their names must say so as well.

    Raises ``ValueError`` for an archive or a compressed file of another kind.
    """
    if by_name_too and path.suffix.lower() not in _SUFFIXES:
        return False
    with path.open("rb") as file:
        return _format(file.read(_HEAD), path) is not None


def read_blocks(path: Path, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the bytes of a file, unpacked where it is compressed, in blocks of ``size``; the last may be shorter.

    Raises:
        ValueError: if the file is damaged or incomplete, or packed in a way that Python's standard library cannot unpack.
    """
    opened: Callable[[Path], BinaryIO] = _OPENERS[packed] if (packed := _packed(path)) else _open
    try:
        with opened(path) as file:
            while block := file.read(size):
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not gzip's or bz2's
            raise
        raise ValueError(f"{path} is damaged or incomplete ({error}): copy it again.") from error


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _packed(path: Path) -> str | None:
    """Return how the file is compressed; refuse it if what is in it is packed again."""
    with path.open("rb") as file:
        packed = _format(file.read(_HEAD), path)
    if packed is not None:
        with _OPENERS[packed](path) as file:
            try:
                head = file.read(_HEAD)
            except (EOFError, OSError, zlib.error, lzma.LZMAError):
                return packed  # reading on says what is wrong
        if (inner := _match(head)) is not None:
            raise ValueError(f"{path} holds a {inner} file in a {packed} file: unpack it and give the files in it.")
    return packed


def _format(head: bytes, path: Path) -> str | None:
    name = _match(head)
    if name is not None and name not in _OPENERS:
        raise ValueError(
            f"{path} is a {name} file, which is not unpacked here: unpack it ({_FORMATS[name][1]} {path})."
        )
    return name


def _match(head: bytes) -> str | None:
    return next((name for name, (magic, _) in _FORMATS.items() if re.match(magic, head, re.DOTALL)), None)
