"""A local double of the Hugging Face hub: it gives the replies of the real protocol.

It is no hub: it keeps files in memory, knows one token, and takes large files by LFS, not by Xet. The replies are those that
huggingface_hub's own code reads: https://huggingface.co/docs/hub/api, and Git LFS's batch API.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the double was asked, and what it holds."""

    token: str
    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository, as in its address → path → content."""
    uploaded: dict[str, bytes] = field(default_factory=dict)
    """sha256 → content of a large file."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""


@contextmanager
def running(token: str) -> Iterator[Hub]:
    """The double on a free port of loopback."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        if self._allowed() and self.path == "/api/whoami-v2":
            self._reply({"type": "user", "name": "ann", "auth": {"type": "access_token"}})

    def do_PUT(self) -> None:
        """A large file, at the address that the batch gave; the storage asks for no token."""
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.uploaded[self.path.rpartition("/")[2]] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        if self._allowed():
            self._answer(self._body())

    def _answer(self, body: bytes) -> None:
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if found := re.fullmatch(
            r"/api/((?:models|datasets)/.+)/(preupload|commit)/main", self.path
        ):
            repo, what = found.groups()
            return self._preupload(body) if what == "preupload" else self._commit(repo, body)
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        return self._reply({"error": "Not found"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        kind, name = wanted.get("type", "model"), f"{wanted['organization']}/{wanted['name']}"
        path = f"{kind}s/{name}"
        url = f"{self.hub.address}/{'' if kind == 'model' else f'{kind}s/'}{name}"
        if path in self.hub.files:
            error = f"You already created this {kind} repo"
            return self._reply({"error": error, "url": url}, 409)
        self.hub.created.append(wanted)
        self.hub.files[path] = {}
        return self._reply({"url": url, "name": name, "id": "66aa"})

    def _preupload(self, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._reply({"files": files, "commitOid": COMMIT})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.address}/storage/{each['oid']}"}},
            }
            for each in wanted["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.uploaded[value["oid"]]
        url = f"{self.hub.address}/{repo.removeprefix('models/')}/commit/{COMMIT}"
        self._reply({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _allowed(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("authorization") == f"Bearer {self.hub.token}":
            return True
        self._body()
        self._reply({"error": "Invalid username or password."}, 401)
        return False

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _reply(self, document: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
