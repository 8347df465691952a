from __future__ import annotations

import hashlib
import http.server
import os
import random
import socket
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lss.data import Enwik8DataModule
from lightning_lss.data.download import DownloadError, ZipSource

TEXT = random.Random(0).randbytes(5000)


class Server(http.server.ThreadingHTTPServer):
    """A web server with one file, which it can send badly."""

    content = b""
    ranges = True  # whether it knows of Range
    breaks_after: int | None = None  # bytes, in the next response
    content_range: str | None = None  # to send another than the true one

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str | None] = []  # the Range of each


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 10  # seconds

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            size = len(server.content)
            self.send_header("Content-Range", server.content_range or f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])
        server.breaks_after = None

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def source(server: Server, tmp_path: Path) -> ZipSource:
    """A small enwik8, served by ``server``."""
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("tiny8", TEXT)
    server.content = archive.read_bytes()
    archive.unlink()
    return ZipSource(
        url=f"http://127.0.0.1:{server.server_port}/tiny8.zip",
        zip_bytes=len(server.content),
        zip_sha256=hashlib.sha256(server.content).hexdigest(),
        member="tiny8",
        member_bytes=len(TEXT),
        member_sha256=hashlib.sha256(TEXT).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def make_data(source: ZipSource, cache: Path, **options: Any) -> Enwik8DataModule:
    return Enwik8DataModule(**{"seq_len": 10, "batch_size": 2, "cache_dir": cache, "source": source, **options})


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"tiny8.lock"}


def break_off(server: Server, source: ZipSource, cache: Path) -> int:
    """Let a first download stop half-way; return how many bytes arrived."""
    server.breaks_after = source.zip_bytes // 2
    with pytest.raises(DownloadError, match="Run again to go on where it stopped"):
        make_data(source, cache).prepare_data()
    assert names(cache) == {"tiny8.zip.part"}
    assert (cache / "tiny8.zip.part").read_bytes() == server.content[: source.zip_bytes // 2]
    return source.zip_bytes // 2


def test_splits_are_90_5_and_5_million_bytes(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.touch()
    os.truncate(path, 100_000_000)  # a hole, which takes no space on disk
    data = Enwik8DataModule(seq_len=999, batch_size=2, path=path)
    data.prepare_data()
    data.setup()
    spans = {split: samples.span for split, samples in data.datasets.items()}
    assert spans == {
        "train": range(90_000_000),
        "val": range(90_000_000, 95_000_000),
        "test": range(95_000_000, 100_000_000),
    }
    assert (data.vocab_size, data.bytes_per_token) == (256, 1.0)


class TestDownload:
    def test_downloads_once(self, server: Server, source: ZipSource, cache: Path) -> None:
        for _ in range(2):
            make_data(source, cache).prepare_data()
        assert server.requests == [None]
        assert names(cache) == {"tiny8"}
        assert (cache / "tiny8").read_bytes() == TEXT
        data = make_data(source, cache)
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        assert bytes(batch["inputs"].flatten().tolist()) == TEXT[4750:4770]
        assert bytes(batch["targets"].flatten().tolist()) == TEXT[4751:4771]

    def test_goes_on_where_it_broke_off(self, server: Server, source: ZipSource, cache: Path) -> None:
        have = break_off(server, source, cache)
        make_data(source, cache).prepare_data()
        assert server.requests == [None, f"bytes={have}-"]
        assert names(cache) == {"tiny8"}
        assert (cache / "tiny8").read_bytes() == TEXT

    def test_starts_afresh_if_the_server_ignores_range(self, server: Server, source: ZipSource, cache: Path) -> None:
        have = break_off(server, source, cache)
        server.ranges = False
        make_data(source, cache).prepare_data()
        assert server.requests == [None, f"bytes={have}-", None]
        assert (cache / "tiny8").read_bytes() == TEXT

    @pytest.mark.parametrize("content_range", ["bytes 0-9/10", "bytes */10", "nonsense"])
    def test_starts_afresh_if_the_rest_does_not_fit(
        self, server: Server, source: ZipSource, cache: Path, content_range: str
    ) -> None:
        break_off(server, source, cache)
        server.content_range = content_range
        make_data(source, cache).prepare_data()
        assert server.requests[2:] == [None]
        assert (cache / "tiny8").read_bytes() == TEXT

    def test_starts_afresh_if_the_server_has_no_such_range(
        self, server: Server, source: ZipSource, cache: Path
    ) -> None:
        have = break_off(server, source, cache)
        server.content = server.content[:have]
        with pytest.raises(DownloadError, match=f"broke off after {have} of {source.zip_bytes} bytes"):
            make_data(source, cache).prepare_data()
        assert server.requests == [None, f"bytes={have}-", None]

    def test_needs_no_request_if_only_unpacking_was_left(self, server: Server, source: ZipSource, cache: Path) -> None:
        cache.mkdir()
        (cache / "tiny8.zip.part").write_bytes(server.content)
        (cache / "tiny8.part").write_bytes(TEXT[:100])  # the process died while it unpacked
        make_data(source, cache).prepare_data()
        assert server.requests == []
        assert (cache / "tiny8").read_bytes() == TEXT
        assert names(cache) == {"tiny8"}

    @pytest.mark.parametrize("change", [b"x", b"longer"])
    def test_refuses_and_removes_what_is_corrupt(
        self, server: Server, source: ZipSource, cache: Path, change: bytes
    ) -> None:
        good = server.content
        server.content = good[:-1] + change
        with pytest.raises(DownloadError, match=r"is not the file wanted and was removed.*" + source.zip_sha256):
            make_data(source, cache).prepare_data()
        assert names(cache) == set()
        server.content = good
        make_data(source, cache).prepare_data()
        assert (cache / "tiny8").read_bytes() == TEXT

    def test_refuses_a_member_that_is_not_the_one_wanted(self, source: ZipSource, cache: Path) -> None:
        with pytest.raises(DownloadError, match="is not the file wanted: its size or SHA-256 differs"):
            make_data(replace(source, member_sha256="0" * 64), cache).prepare_data()
        assert "tiny8" not in names(cache)
        assert "tiny8.part" not in names(cache)

    def test_replaces_a_file_of_another_size(self, source: ZipSource, cache: Path) -> None:
        cache.mkdir()
        (cache / "tiny8").write_bytes(TEXT[:-1])
        make_data(source, cache).prepare_data()
        assert (cache / "tiny8").read_bytes() == TEXT

    def test_offline_says_where_to_put_a_copy(self, source: ZipSource, cache: Path) -> None:
        with socket.socket() as closed:  # bound, but nobody listens
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/tiny8.zip"
            with pytest.raises(DownloadError) as error:
                make_data(source, cache, url=url).prepare_data()
        for part in (url, str(cache), "tiny8.zip", "data.path="):
            assert part in str(error.value)

    def test_several_processes_download_once(self, server: Server, source: ZipSource, cache: Path) -> None:
        # The lock is one of the file system, so threads with a lock object each meet as processes do.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: make_data(source, cache).prepare_data(), range(4)))
        assert server.requests == [None]
        assert (cache / "tiny8").read_bytes() == TEXT

    def test_cache_follows_xdg(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert Enwik8DataModule(seq_len=10, batch_size=2).cache_dir == tmp_path / "lightning_lss" / "enwik8"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        expected = tmp_path / "home" / ".cache" / "lightning_lss" / "enwik8"
        assert Enwik8DataModule(seq_len=10, batch_size=2).cache_dir == expected


class TestCopyOnDisk:
    @pytest.mark.parametrize("named", ["file", "folder"])
    def test_unpacked_file_is_used_in_place(
        self, server: Server, source: ZipSource, cache: Path, tmp_path: Path, named: str
    ) -> None:
        copy = tmp_path / "copies" / "tiny8"
        copy.parent.mkdir()
        copy.write_bytes(TEXT)
        data = make_data(source, cache, path=copy if named == "file" else copy.parent)
        data.prepare_data()
        assert data.text_path == copy
        data.setup("fit")
        assert torch.equal(data.datasets["train"][0]["inputs"], torch.tensor(list(TEXT[:10])))
        assert server.requests == []
        assert not cache.exists()

    @pytest.mark.parametrize("named", ["file", "folder"])
    def test_archive_is_unpacked_into_the_cache(
        self, server: Server, source: ZipSource, cache: Path, tmp_path: Path, named: str
    ) -> None:
        copy = tmp_path / "copies" / "tiny8.zip"
        copy.parent.mkdir()
        copy.write_bytes(server.content)
        data = make_data(source, cache, path=copy if named == "file" else copy.parent)
        data.prepare_data()
        assert data.text_path == cache / "tiny8"
        assert data.text_path.read_bytes() == TEXT
        assert copy.read_bytes() == server.content
        assert server.requests == []

    def test_archive_in_the_cache_is_unpacked_and_kept(self, server: Server, source: ZipSource, cache: Path) -> None:
        cache.mkdir()
        (cache / "tiny8.zip").write_bytes(server.content)
        make_data(source, cache).prepare_data()
        assert names(cache) == {"tiny8", "tiny8.zip"}
        assert server.requests == []

    def test_refuses_a_damaged_archive_and_leaves_it(
        self, server: Server, source: ZipSource, cache: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy.zip"
        copy.write_bytes(server.content[:-1] + b"x")
        with pytest.raises(ValueError, match=r"copy\.zip is damaged: its SHA-256 is not"):
            make_data(source, cache, path=copy).prepare_data()
        assert copy.exists()
        assert not (cache / "tiny8").exists()

    def test_refuses_a_missing_path(self, source: ZipSource, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere"):
            make_data(source, cache, path=tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"There is no .*tiny8 or .*tiny8\.zip"):
            make_data(source, cache, path=tmp_path)

    def test_refuses_another_size(self, source: ZipSource, cache: Path, tmp_path: Path) -> None:
        copy = tmp_path / "tiny8"
        copy.write_bytes(TEXT[:-1])
        with pytest.raises(ValueError, match=r"has 4999 bytes, but tiny8 has 5000 .* Copy it again"):
            make_data(source, cache, path=tmp_path)

    def test_setup_needs_prepare_data(self, source: ZipSource, cache: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"Call prepare_data\(\) first"):
            make_data(source, cache).setup("fit")
