"""enwik8: its splits, its download from a server on this machine, and copies on disk."""

import hashlib
import http.server
import io
import os
import random
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pooch
import pytest

from lightning_lss.data import Enwik8DataModule
from lightning_lss.data.download import DownloadError, ZippedFile
from lightning_lss.data.enwik8 import ENWIK8

TEXT = random.Random(0).randbytes(5000)


class Server(http.server.ThreadingHTTPServer):
    """A web server with one file, slow enough for two clients to meet."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.broken = 0  # so many of the next responses break off half-way
        self.requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 10  # seconds

    def do_GET(self) -> None:
        server = self.server
        server.requests += 1
        time.sleep(0.2)
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: len(server.content) // 2 if server.broken > 0 else None])
        server.broken -= 1

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("tiny8", TEXT)
    with Server(archive.getvalue()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def source(server: Server) -> ZippedFile:
    """A small enwik8, served by ``server``."""
    return ZippedFile(
        url=f"http://127.0.0.1:{server.server_port}/tiny8.zip",
        zip_sha256=hashlib.sha256(server.content).hexdigest(),
        name="tiny8",
        sha256=hashlib.sha256(TEXT).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr("pooch.core.time", type("", (), {"sleep": lambda seconds: None}))


def make_data(source: ZippedFile, cache: Path, **options: Any) -> Enwik8DataModule:
    return Enwik8DataModule(**{"seq_len": 10, "batch_size": 2, "cache_dir": cache, "source": source, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}


def test_splits_are_90_5_and_5_million_bytes(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    path.touch()
    os.truncate(path, 100_000_000)  # a hole, which takes no space on disk
    empty = replace(ENWIK8, sha256=pooch.file_hash(path))
    data = Enwik8DataModule(seq_len=999, batch_size=2, path=path, source=empty)
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
    def test_downloads_once(self, server: Server, source: ZippedFile, cache: Path) -> None:
        for _ in range(2):
            make_data(source, cache).prepare_data()
        assert server.requests == 1
        assert contents(cache) == {"tiny8": TEXT, "tiny8.zip": server.content}
        data = make_data(source, cache)
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        assert bytes(batch["inputs"].flatten().tolist()) == TEXT[4750:4770]
        assert bytes(batch["targets"].flatten().tolist()) == TEXT[4751:4771]

    def test_two_processes_download_once(self, world, server: Server, source: ZippedFile, cache: Path) -> None:
        world.run(2, prepare, source, cache)
        assert server.requests == 1
        assert contents(cache) == {"tiny8": TEXT, "tiny8.zip": server.content}

    def test_tries_again_when_the_connection_breaks(
        self, impatient, server: Server, source: ZippedFile, cache: Path
    ) -> None:
        server.broken = 2
        make_data(source, cache).prepare_data()
        assert server.requests == 3
        assert contents(cache)["tiny8"] == TEXT

    @pytest.mark.parametrize("fault", ["broken", "another file"])
    def test_leaves_nothing_of_a_failed_download(
        self, impatient, server: Server, source: ZippedFile, cache: Path, fault: str
    ) -> None:
        good = server.content
        if fault == "broken":
            server.broken = 3
        else:
            server.content = good[:-1] + b"x"
        with pytest.raises(DownloadError, match=r"could not be downloaded \(.*(IncompleteRead|does not match)"):
            make_data(source, cache).prepare_data()
        assert contents(cache) == {}
        server.content = good
        make_data(source, cache).prepare_data()
        assert contents(cache) == {"tiny8": TEXT, "tiny8.zip": good}

    def test_offline_says_where_to_put_a_copy(self, impatient, source: ZippedFile, cache: Path) -> None:
        with socket.socket() as closed:  # bound, but nobody listens
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/tiny8.zip"
            with pytest.raises(DownloadError) as error:
                make_data(source, cache, url=url).prepare_data()
        for part in (url, str(cache), "tiny8.zip", "data.path=", "data.url="):
            assert part in str(error.value)

    def test_replaces_what_a_killed_process_left(self, server: Server, source: ZippedFile, cache: Path) -> None:
        cache.mkdir()
        for name in ("tiny8", "tiny8.part", "tiny8.zip"):
            (cache / name).write_bytes(TEXT[:-1])
        make_data(source, cache).prepare_data()
        assert contents(cache) == {"tiny8": TEXT, "tiny8.zip": server.content}

    def test_refuses_a_file_with_another_hash(self, source: ZippedFile, cache: Path) -> None:
        with pytest.raises(ValueError, match=r"tiny8 in .* is another file: its SHA-256 is not 000"):
            make_data(replace(source, sha256="0" * 64), cache).prepare_data()
        assert contents(cache).keys() == {"tiny8.zip"}


def prepare(rank: int, source: ZippedFile, cache: Path) -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    make_data(source, cache).prepare_data()


class TestCopyOnDisk:
    @pytest.mark.parametrize("named", ["file", "folder"])
    @pytest.mark.parametrize("kind", ["tiny8", "tiny8.zip"])
    def test_is_used_without_a_download(
        self, server: Server, source: ZippedFile, cache: Path, tmp_path: Path, kind: str, named: str
    ) -> None:
        copy = tmp_path / "copies" / kind
        copy.parent.mkdir()
        copy.write_bytes(TEXT if kind == "tiny8" else server.content)
        data = make_data(source, cache, path=copy if named == "file" else copy.parent)
        data.prepare_data()
        assert data.text_path == (copy if kind == "tiny8" else cache / "tiny8")
        assert data.text_path.read_bytes() == TEXT
        assert list(copy.parent.iterdir()) == [copy]
        data.setup("fit")
        assert bytes(data.datasets["train"][0]["inputs"].tolist()) == TEXT[:10]
        assert server.requests == 0

    def test_in_the_cache_is_used_without_a_download(self, server: Server, source: ZippedFile, cache: Path) -> None:
        cache.mkdir()
        (cache / "tiny8.zip").write_bytes(server.content)
        make_data(source, cache).prepare_data()
        assert contents(cache) == {"tiny8": TEXT, "tiny8.zip": server.content}
        assert server.requests == 0

    def test_is_refused_and_left_if_damaged(
        self, server: Server, source: ZippedFile, cache: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy.zip"
        copy.write_bytes(server.content[:-1] + b"x")
        with pytest.raises(ValueError, match=r"copy\.zip has the SHA-256 .*, but tiny8 has .* copy it again"):
            make_data(source, cache, path=copy)
        assert copy.exists()
        assert not cache.exists()

    def test_is_refused_if_missing(self, source: ZippedFile, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\."):
            make_data(source, cache, path=tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"There is no file .*tiny8 or .*tiny8\.zip\."):
            make_data(source, cache, path=tmp_path)

    def test_is_refused_if_incomplete(self, source: ZippedFile, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "tiny8").write_bytes(TEXT[:-1])
        with pytest.raises(ValueError, match=r"tiny8 has the SHA-256 .*, but tiny8 has .* copy it again"):
            make_data(source, cache, path=tmp_path)

    def test_setup_needs_prepare_data(self, source: ZippedFile, cache: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"Call prepare_data\(\) first"):
            make_data(source, cache).setup("fit")
