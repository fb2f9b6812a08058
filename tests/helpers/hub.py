"""A small server that speaks as much of the Hugging Face Hub's API as fetching a file needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """
    Attributes:
        repos: the files of each repository, by name.
        gated: repositories that only this token may read.
        requests: "METHOD path" of each that came.
    """

    repos: dict[str, dict[str, bytes]]
    gated: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond()

        def do_HEAD(self) -> None:
            self.respond()

        def respond(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.about("/".join(parts[2:4]))
            elif "resolve" in parts:
                self.file("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self.refuse(404, "EntryNotFound")

        def about(self, repo: str) -> None:
            if repo not in hub.repos:
                self.refuse(401, "RepoNotFound")
                return
            files = [{"rfilename": name} for name in hub.repos[repo]]
            answer = {"_id": "0", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": []}
            self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def file(self, repo: str, name: str) -> None:
            token = hub.gated.get(repo)
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self.refuse(403, "GatedRepo")
            elif (content := hub.repos.get(repo, {}).get(name)) is None:
                self.refuse(404, "EntryNotFound")
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

        def refuse(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
