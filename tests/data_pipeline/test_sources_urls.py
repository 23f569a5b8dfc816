"""Sources behind URLs: object stores and web servers, faults on the way, addresses that do not answer."""

from __future__ import annotations

import gzip
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longspan.data_pipeline.source_config import ArchiveConfig, JsonLinesConfig, ParquetConfig, WebDatasetConfig
from longspan.data_pipeline.sources import places
from longspan.data_pipeline.sources.registry import open_source
from longspan.data_pipeline.storage.retry import RetryPolicy
from longspan.errors import UsageError
from tests.data_pipeline.source_files import tar_bytes, zip_bytes

ROWS = [{"text": "first"}, {"text": "second"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
IMPATIENT = RetryPolicy(attempts=2, first_delay_seconds=0.01, timeout_seconds=0.5)


def table() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "rows.parquet": table,
    "rows.zip": lambda: zip_bytes({"1.txt": b"first", "2.txt": b"second"}),
    "rows.tar": lambda: tar_bytes({"1.txt": b"first", "2.txt": b"second"}),
}


def config(url: str) -> Any:
    kinds = {".gz": JsonLinesConfig, ".parquet": ParquetConfig, ".zip": ArchiveConfig, ".tar": WebDatasetConfig}
    kind = kinds["." + url.split("?")[0].rsplit(".", 1)[1]]
    return kind(kind=kind.model_fields["kind"].annotation.__args__[0], name="far", paths=(url,))


def texts(url: str) -> list[bytes]:
    return [document.text for document in open_source(config(url)).documents]


@pytest.fixture
def memory() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()
    store.pseudo_dirs[:] = [""]


class Server:
    """A web server on the loopback that fails on demand."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fault = outer.faults.pop(0) if outer.faults else ""
                data = outer.files.get(self.path)
                if fault == "500" or data is None:
                    self.send_error(500 if fault == "500" else 404)
                    return
                first = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(data) - first))
                if first:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if fault == "stall":
                    time.sleep(1.5)
                self.wfile.write(data[first : -len(data) // 2] if fault == "cut" else data[first:])
                if fault in ("cut", "stall"):
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(places, "FETCH_POLICY", IMPATIENT)
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("name", FILES)
def test_object_stores(memory: Any, name: str) -> None:
    memory.pipe(f"/bucket/{name}", FILES[name]())
    assert texts(f"memory://bucket/{name}") == [b"first", b"second"]


def test_patterns_on_object_stores(memory: Any) -> None:
    for number in (2, 1):
        memory.pipe(f"/bucket/part-{number}.jsonl.gz", gzip.compress(json.dumps({"text": str(number)}).encode()))
    assert texts("memory://bucket/part-*.jsonl.gz") == [b"1", b"2"]
    with pytest.raises(UsageError, match=r"source far: nothing matches memory://bucket/x-\*"):
        texts("memory://bucket/x-*.jsonl.gz")


@pytest.mark.parametrize("name", FILES)
def test_web_servers(server: Server, name: str) -> None:
    server.files[f"/a%20b/{name}"] = FILES[name]()
    assert texts(f"{server.url}/a%20b/{name}") == [b"first", b"second"]


def test_a_signed_address(server: Server) -> None:
    server.files["/rows.zip?key=a/b%2Fc&x=1+2"] = FILES["rows.zip"]()
    assert texts(f"{server.url}/rows.zip?key=a/b%2Fc&x=1+2") == [b"first", b"second"]


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_a_fault_on_the_way_is_overcome(server: Server, fault: str) -> None:
    server.files["/rows.zip"] = FILES["rows.zip"]()
    server.faults = [fault]
    assert texts(f"{server.url}/rows.zip") == [b"first", b"second"]


def test_file_urls(tmp_path: Path) -> None:
    (tmp_path / "rows.zip").write_bytes(FILES["rows.zip"]())
    assert texts(f"file://{tmp_path}/rows.zip") == [b"first", b"second"]


def test_what_is_not_there_or_does_not_answer(server: Server, memory: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/rows.zip"
        started = time.monotonic()
        for url in (f"{server.url}/gone.zip", nobody, "http://nosuch.invalid/rows.zip", "memory://bucket/gone.zip"):
            with pytest.raises(UsageError, match=r"^source far: ") as caught:
                texts(url)
            assert f"{url} cannot be fetched: " in str(caught.value)
    server.files["/rows.zip"] = FILES["rows.zip"]()
    server.faults = ["stall"] * 9
    with pytest.raises(UsageError, match=r"rows\.zip cannot be fetched: .*could not be read in 2 attempts"):
        texts(f"{server.url}/rows.zip")
    assert time.monotonic() - started < 15


def test_a_store_that_never_lists(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FETCH_POLICY", IMPATIENT)
    monkeypatch.setattr(type(memory), "glob", lambda *_: time.sleep(3))
    with pytest.raises(UsageError, match=r"memory://bucket/\* cannot be listed: no answer in 0\.5 s"):
        open_source(JsonLinesConfig(kind="jsonl", name="far", paths=("memory://bucket/*",)))


def test_a_store_whose_package_is_missing() -> None:
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UsageError, match=r"source far: s3://bucket/rows\.zip: Install s3fs"):
        texts("s3://bucket/rows.zip")


def test_a_damaged_file_is_named_by_its_address(server: Server) -> None:
    server.files["/rows.jsonl.gz"] = gzip.compress(LINES)[:-9]
    with pytest.raises(UsageError, match=r"source far: http://127\.0\.0\.1:\d+/rows\.jsonl\.gz cannot be read: "):
        texts(f"{server.url}/rows.jsonl.gz")


def test_nothing_fetched_stays(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.files["/rows.tar"] = FILES["rows.tar"]()
    stream = iter(open_source(config(f"{server.url}/rows.tar")).documents)
    assert next(stream).text == b"first"
    assert len(list(tmp_path.iterdir())) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())
