"""Compressed files: told by their first bytes, unpacked or refused, and never trained on as they are."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_lss.data import TextDataModule
from lightning_lss.data.files import read_blocks

TEXT = b"".join(b"line %d of a text\n" % i for i in range(400))
PACK = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


def make_text(tmp_path: Path, **options: Any) -> TextDataModule:
    return TextDataModule(
        **{"path": tmp_path / "text", "seq_len": 8, "batch_size": 2, "cache_dir": tmp_path / "cache", **options}
    )


def packed_as(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("text", TEXT)
    elif kind in ("tar", "tar.gz"):
        with tarfile.open(fileobj=file, mode="w:gz" if kind == "tar.gz" else "w") as archive:
            member = tarfile.TarInfo("text")
            member.size = len(TEXT)
            archive.addfile(member, io.BytesIO(TEXT))
    else:
        return {"zstd": b"\x28\xb5\x2f\xfd", "7z": b"7z\xbc\xaf\x27\x1c"}[kind] + b"\0" * 99
    return file.getvalue()


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("prepare", [True, False], ids=["prepared", "set up only"])
def test_text_is_unpacked_whatever_the_file_is_called(tmp_path: Path, kind: str, prepare: bool) -> None:
    (tmp_path / "text").write_bytes(PACK[kind](TEXT))
    data = make_text(tmp_path)
    assert not (tmp_path / "cache").exists()
    if prepare:
        data.prepare_data()
        assert (tmp_path / "cache").exists()
    data.setup()
    assert bytes(data.tokens.read(0, len(TEXT)).tolist()) == TEXT
    assert bytes(data.datasets["train"][1]["inputs"].tolist()) == TEXT[8:16]


def test_a_folder_may_have_both_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in (("a", gzip.compress(b"a" * 50)), ("b", b"b" * 50), ("c.fa.gz", bz2.compress(b"c" * 50))):
        (folder / name).write_bytes(content)
    data = make_text(tmp_path, path=folder)
    assert bytes(data.tokens.read(0, 150).tolist()) == b"a" * 50 + b"b" * 50 + b"c" * 50


@pytest.mark.parametrize(("kind", "remedy"), [("zip", "unzip"), ("zstd", "unzstd"), ("7z", "7z x"), ("tar", "tar -xf")])
def test_other_packed_files_are_refused_at_once(tmp_path: Path, kind: str, remedy: str) -> None:
    (tmp_path / "text").write_bytes(packed_as(kind))
    with pytest.raises(ValueError, match=rf"text is a {kind} file, which is not unpacked here: unpack it \({remedy} "):
        make_text(tmp_path)


def test_an_archive_in_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(packed_as("tar.gz"))
    with pytest.raises(ValueError, match="holds a tar file in a gzip file: unpack it"):
        make_text(tmp_path).prepare_data()


@pytest.mark.parametrize("kind", PACK)
def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    whole = PACK[kind](TEXT)
    damaged = {"cut": whole[:-10], "changed": whole[:60] + bytes(x ^ 255 for x in whole[60:80]) + whole[80:]}
    for content in (*damaged.values(), *damaged.values()):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=r"text is damaged or incomplete \(.*copy it again"):
            make_text(tmp_path).prepare_data()
    (tmp_path / "text").write_bytes(whole)
    assert len(make_text(tmp_path).tokens) == len(TEXT)


def test_a_missing_permission_is_not_taken_for_damage(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no")

    (tmp_path / "text").write_bytes(TEXT)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        next(read_blocks(tmp_path / "text"))


def test_token_files_may_begin_like_compressed_ones(tmp_path: Path) -> None:
    tokens = np.array([0x8B1F, 0x0008, *range(100)], np.uint16)  # the bytes of gzip
    tokens.tofile(tmp_path / "text")
    assert make_text(tmp_path, dtype="uint16", vocab_size=1 << 16).tokens.read(0, 1).tolist() == [0x8B1F]
    (tmp_path / "text.gz").write_bytes(gzip.compress(tokens[2:].tobytes()))
    data = make_text(tmp_path, path=tmp_path / "text.gz", dtype="uint16", vocab_size=1 << 16)
    assert data.tokens.read(0, 100).tolist() == [*range(100)]


def test_wrong_shares_are_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(gzip.compress(TEXT))
    with pytest.raises(ValueError, match="must be three positive shares"):
        make_text(tmp_path, splits=(1, 1, 1))
    assert not (tmp_path / "cache").exists()
