"""What is made of files and kept: once, by their content, and whole."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_lss.data import cache as cache_module
from lightning_lss.data.cache import file_digest, made_once


def write(folder: Path) -> None:
    (folder / "made").write_text("whole")


def test_is_made_once_by_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_text("a")
    os.utime(tmp_path / "source", (1e9, 1e9))
    made: list[Path] = []
    found: list[str] = []
    barrier = threading.Barrier(4)

    class Lock(cache_module.FileLock):  # type: ignore[misc]
        def __enter__(self) -> Any:
            barrier.wait(10)  # nobody has made anything when the last one comes
            return super().__enter__()

    def make(folder: Path) -> None:
        made.append(folder)
        write(folder)

    def run() -> None:
        found.append((made_once(tmp_path / "cache", [tmp_path / "source"], {}, make) / "made").read_text())

    monkeypatch.setattr(cache_module, "FileLock", Lock)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4
    assert len(made) == 1


def test_belongs_to_the_content_the_order_and_the_choices(tmp_path: Path) -> None:
    one, two, same = (tmp_path / name for name in "abc")
    for path, content in ((one, "1"), (two, "2"), (same, "1")):
        path.write_text(content)
    given = [([one], {}), ([two], {}), ([one, two], {}), ([two, one], {}), ([one], {"end": 0}), ([one], {"end": None})]
    folders = [made_once(tmp_path / "cache", sources, choices, write) for sources, choices in given]
    assert len(set(folders)) == len(given)
    assert made_once(tmp_path / "cache", [same], {}, write) == folders[0]


def test_what_failed_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("a")

    def fail(folder: Path) -> None:
        (folder / "left over").touch()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        made_once(tmp_path / "cache", [tmp_path / "source"], {}, fail)
    folder = made_once(tmp_path / "cache", [tmp_path / "source"], {}, write)
    assert [path.name for path in folder.iterdir()] == ["made"]


def test_a_file_is_not_read_again_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = tmp_path / "source", []
    hashed = cache_module.pooch.file_hash
    monkeypatch.setattr(cache_module.pooch, "file_hash", lambda path: (read.append(path), hashed(path))[1])
    source.write_text("a")
    for _ in range(2):
        first = file_digest(source, tmp_path)
    assert len(read) == 2  # it has just been written, and may be again within the same tick of the clock
    os.utime(source, (1e9, 1e9))
    for _ in range(3):
        assert file_digest(source, tmp_path) == first
    assert len(read) == 3
    source.write_text("b")
    os.utime(source, (1e9 + 1, 1e9 + 1))
    assert file_digest(source, tmp_path) != first
