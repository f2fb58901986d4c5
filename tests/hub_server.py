"""What stands in for the hub: a small HTTP server, run in a thread, with the models of a folder.

It serves what `huggingface_hub` asks for: a model's listing, its tree, and its files with their tags and their commit.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Hub(ThreadingHTTPServer):
    """Serves `root`/organisation/name; `asked` is what was asked for, as method and path."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.root, self.asked = root, []

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """The files that were sent, without repetition."""
        sent = {path.split("/resolve/")[1] for method, path in self.asked if method == "GET sent"}
        return sorted({path.partition("/")[2] for path in sent})


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._listing(parts[2:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._send(404, b"", {})

    def _listing(self, parts: list[str]) -> None:
        name = "/".join(parts[:2])
        if name == "org/gated":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        folder = self.server.root / name
        if not folder.is_dir():
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in REVISIONS:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if len(parts) > 2 and parts[2] == "tree":
            found = [
                {"type": "file", "path": one, "size": path.stat().st_size, "oid": tag(path)}
                for one, path in zip(names, files, strict=True)
            ]
            return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        content = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in names]}
        return self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        path = self.server.root / name / file
        if revision not in REVISIONS:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if not path.is_file():
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        if body:
            self.server.asked.append(("GET sent", self.path))
        return self._send(200, path.read_bytes(), headers | {"ETag": f'"{tag(path)}"'}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


def tag(path: Path) -> str:
    """What tells versions of a file apart."""
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def served(root: Path) -> Iterator[Hub]:
    """The hub for the length of a block."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
