"""A hub on this machine: as much of the hub's HTTP interface as uploading a folder needs, and what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class Hub:
    """State of the stand-in.

    Attributes:
        fail: HTTP status that every request for this path's part gets; 0: the connection is cut in the answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.fail: tuple[str, int] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                self.answer()

            def do_PUT(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self) -> None:
                body = self.body()
                path = self.path.split("?")[0]
                hub.requests.append(f"{self.command} {path}")
                if hub.fail is not None and hub.fail[0] in path:
                    if not hub.fail[1]:
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                        self.close_connection = True
                        return None
                    return self.reply(hub.fail[1], {"error": "told to fail"})
                upload = path.startswith("/upload/")  # its address is the permission
                if not upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.reply(401, {"error": "Invalid credentials"})
                status, value = hub.handle(self.command, path, body, f"http://{self.headers['Host']}")
                self.reply(status, value)

            def reply(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, method: str, path: str, body: bytes, host: str) -> tuple[int, Any]:
        """Status and JSON of one request."""
        if path == "/api/repos/create":
            return self.create(json.loads(body), host)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/upload/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2], "other bytes than announced"
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{host}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        kind, _, rest = path.removeprefix("/api/").partition("/")
        assert kind == "models", path
        name, _, action = "/".join(rest.split("/")[:2]), None, "/".join(rest.split("/")[2:])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self.repository(name, action, body, host)

    def create(self, asked: dict[str, Any], host: str) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        address = {"url": f"{host}/{name}", "name": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **address}
        self.repositories[name] = {".gitattributes": b""}
        self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, address

    def repository(self, name: str, action: str, body: bytes, host: str) -> tuple[int, Any]:
        files = self.repositories[name]
        if action.startswith("preupload/"):
            return 200, {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if action.startswith("commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    raise AssertionError(line["key"])
            return 200, {"commitUrl": f"{host}/{name}/commit/{len(self.commits):040d}", "commitOid": "0" * 40}
        if action.startswith("tree/"):
            return 200, [{"type": "file", "path": path, "size": len(c), "oid": "0" * 40} for path, c in files.items()]
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings, "private": self.private[name]}
