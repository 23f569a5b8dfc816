"""A loopback web server over a folder, with byte ranges and ETags, that can be told to misbehave.

Every fault is counted when it happens, so that a test can prove that it did.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("status500", "truncate", "stall", "wrong_bytes", "close")


class ShardServer:
    """Serves `folder` at `url` until it is closed; use it with `with`.

    Attributes:
        choose: called with the path of each request for a file; one of FAULTS, or None to behave. `script` sets it.
        counts: requests, ranged requests (`ranges`), conditional ones (`if_range`) and faults by name.
        in_flight: requests that are being answered.
        chunk_delay_seconds: pause after each piece of a body.
        honours_ranges: False: every answer is the whole file.
        wrong_stride: of `wrong_bytes`: from the middle of the body on, one byte in so many is wrong; at first only one.
    """

    def __init__(self, folder: Path, choose: Callable[[str], str | None] = lambda path: None) -> None:
        self.folder, self.choose = folder, choose
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.chunk_bytes, self.chunk_delay_seconds = 2**20, 0.0
        self.honours_ranges = True
        self.wrong_stride = 2**30
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def script(self, faults: Iterable[str | None], suffix: str = ".tar") -> None:
        """Give these faults to the next requests for files with this suffix, then behave."""
        waiting = list(faults)

        def choose(path: str) -> str | None:
            return waiting.pop(0) if path.endswith(suffix) and waiting else None

        self.choose = choose

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        with self.lock:
            self.counts[name] += amount

    def __enter__(self) -> ShardServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(server: ShardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:  # the client was killed
                self.close_connection = True

        def do_GET(self) -> None:
            with server.lock:
                server.in_flight += 1
            try:
                self._answer()
            except (ConnectionError, TimeoutError):
                self.close_connection = True
            finally:
                with server.lock:
                    server.in_flight -= 1

        def _answer(self) -> None:
            server.add("requests")
            file = server.folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            fault = server.choose(self.path)
            content = file.read_bytes()
            if fault == "status500":
                server.add(fault)
                self.send_error(500)
                return
            if fault == "close":
                server.add(fault)
                self.close_connection = True
                return
            start, stop = self._range(content)
            if fault == "wrong_bytes" and stop > start:
                server.add(fault)
                changed = bytearray(content)
                for at in range(start + (stop - start) // 2, stop, server.wrong_stride):
                    changed[at] ^= 0x10
                content = bytes(changed)
            self._send(content[start:stop], fault)

        def _range(self, content: bytes) -> tuple[int, int]:
            """Send status and headers; the bytes to send."""
            etag = f'"{len(content)}-{hash(content[:4096]) & 0xFFFF}"'
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            server.add("if_range", condition is not None)
            start, stop = 0, len(content)
            if match and server.honours_ranges and condition in (None, etag):
                server.add("ranges")
                start = int(match[1])
                stop = min(int(match[2]) + 1 if match[2] else stop, stop)
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return 0, 0
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            return start, stop

        def _send(self, body: bytes, fault: str | None) -> None:
            if fault in ("truncate", "stall"):
                server.add(fault)
                self._write(body[: len(body) // 2])
                self.close_connection = True
                if fault == "stall":
                    server.released.wait(30)
                return
            self._write(body)

        def _write(self, body: bytes) -> None:
            for start in range(0, len(body), server.chunk_bytes):
                self.wfile.write(body[start : start + server.chunk_bytes])
                if server.chunk_delay_seconds and server.released.wait(server.chunk_delay_seconds):
                    return

    return Handler
