"""An S3 server on this machine (moto), and the faults that it can be given."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec.config

BUCKET = "checkpoints"
_READ_BYTES = 1000  # of an upload, before its connection is cut


@dataclass
class ObjectServer:
    """The server; `fault` decides about every request from (method, path).

    Attributes:
        url: where it listens. requests: all that came, as "METHOD path". faults: those that met a fault.
        fault: None, "500" (the server fails), "cut" (the connection ends in the middle of the upload).
    """

    url: str = ""
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    fault: Callable[[str, str], str | None] = lambda method, path: None

    def settings(self) -> dict[str, Any]:
        """What fsspec has to know of it."""
        retries = {"config_kwargs": {"retries": {"max_attempts": 1}, "read_timeout": 20}}
        return {"endpoint_url": self.url, "key": "test", "secret": "test", **retries}

    def environment(self) -> dict[str, str]:
        """The same for another process."""
        return {"FSSPEC_S3": json.dumps(self.settings())}

    def wrap(self, application: Any) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
        """The server's application behind the faults."""

        def serve(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            self.requests.append(f"{method} {path}")
            fault = self.fault(method, path)
            if fault is None:
                return application(environ, start_response)  # type: ignore[no-any-return]
            self.faults.append(f"{fault} {method} {path}")
            if fault == "cut":
                environ["wsgi.input"].read(min(_READ_BYTES, int(environ.get("CONTENT_LENGTH") or 2) // 2))
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>We encountered an internal error</Message></Error>"]

        return serve


@contextlib.contextmanager
def object_server() -> Iterator[ObjectServer]:
    """A server with one empty bucket, to which all `s3://` of this process go."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *arguments: Any) -> None:
            pass

    found = ObjectServer()
    application = found.wrap(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    found.url = f"http://127.0.0.1:{server.port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = fsspec.config.conf.get("s3")
    fsspec.config.conf["s3"] = found.settings()
    try:
        with contextlib.suppress(FileExistsError):  # servers of one process share what they hold
            fsspec.filesystem("s3").mkdir(BUCKET)
        yield found
    finally:
        server.shutdown()
        fsspec.config.conf.pop("s3")
        if before is not None:
            fsspec.config.conf["s3"] = before
