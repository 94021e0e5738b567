"""A server on loopback that speaks as much of the Hugging Face hub's protocol as downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_the_tests"
LFS_BYTES = 1 << 12  # files from this size on are stored with LFS, so known by their SHA-256


@dataclass
class Repo:
    """A repository of the server.

    Attributes:
        files: by path.
        kind: ``models`` or ``datasets``.
        private: nobody reads it without the token.
        gated: everybody lists it, and reads it with the token alone.
        revisions: names of its only commit.
        lies: files whose bytes are not those of their hash.
    """

    files: dict[str, bytes]
    kind: str = "models"
    private: bool = False
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    lies: frozenset[str] = frozenset()


@dataclass
class Hub:
    """The server's content, and what was asked of it.

    Attributes:
        repos: by ``owner/name``.
        requests: method, path and range of each.
        sent: bytes of files by path.
        cut_after: the first answers break off after so many bytes, one each.
        ignores_ranges: whole files are sent whatever is asked for.
        slow: a file of which downloads get a few bytes at a time.
        status: that every request is answered with.
        silent: seconds before an answer.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    ignores_ranges: bool = False
    slow: str = ""
    status: int = 0
    silent: float = 0.0
    endpoint: str = ""

    def add_folder(self, name: str, folder: Path, **options: Any) -> Repo:
        """Add a repository with the files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repos[name] = Repo(files={".gitattributes": b"*.safetensors lfs\n"} | files, **options)
        return self.repos[name]

    def fetched(self) -> set[str]:
        """Paths of files of which bytes were sent."""
        return {path for path, count in self.sent.items() if count}


def oid(data: bytes) -> tuple[str, bool]:
    """Hash by which the hub calls a file, and whether it is LFS's."""
    if len(data) >= LFS_BYTES:
        return hashlib.sha256(data).hexdigest(), True
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), False


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a server on a free port of loopback."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Say nothing of clients that go away."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if self.hub.status:
            self._error(self.hub.status, "", "not now")
            return
        if self.hub.silent:
            time.sleep(self.hub.silent)
        url = urlparse(self.path)
        # A slash in a revision is quoted, so nothing is unquoted before the parts are known.
        path = url.path
        self.hub.requests.append((self.command, unquote(path), self.headers.get("Range")))
        api = re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path
        )
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            repo = self._repo(api[2], api[1], api[4] and unquote(api[4]), reads=False)
            if repo is None:
                return
            if api[3] == "tree":
                self._json([self._entry(p, data) for p, data in repo.files.items()])
            else:
                blobs = "blobs" in parse_qs(url.query)
                siblings = [self._sibling(p, d, blobs) for p, d in repo.files.items()]
                facts = {"id": api[2], "sha": COMMIT, "gated": repo.gated, "siblings": siblings}
                self._json(facts | {"private": repo.private, "tags": [], "downloads": 0})
        elif file:
            repo = self._repo(file[1], "models", unquote(file[2]), reads=True)
            if repo is None:
                return
            if unquote(file[3]) not in repo.files:
                self._error(404, "EntryNotFound", "no such file")
                return
            self._file(repo, unquote(file[3]), body)
        else:
            self._error(404, "RepoNotFound", "no such address")

    def _repo(self, name: str, kind: str, revision: str | None, *, reads: bool) -> Repo | None:
        repo = self.hub.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or repo.kind != kind or (repo.private and not allowed):
            # As the hub does, which tells nobody what is private.
            if allowed:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, "RepoNotFound", "Invalid username or password.")
            return None
        if reads and repo.gated and not allowed:
            self._error(401, "GatedRepo", "Access to this model is restricted.")
            return None
        if revision is not None and revision not in (COMMIT, *repo.revisions):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _file(self, repo: Repo, path: str, body: bool) -> None:
        data = repo.files[path]
        name, lfs = oid(data)
        if path in repo.lies:
            data = bytes(data[:-1]) + bytes([data[-1] ^ 1])
        begin, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        whole = len(data)
        if asked and not self.hub.ignores_ranges:
            begin, status = int(asked[1]), 206
            data = data[begin : int(asked[2]) + 1 if asked[2] else None]
        self.send_response(status)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if lfs:
            self.send_header("X-Linked-Etag", f'"{name}"')
            self.send_header("X-Linked-Size", str(whole))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if self.hub.cut_after and len(data) > self.hub.cut_after[0]:
            data = data[: self.hub.cut_after.pop(0)]
            self.close_connection = True
        if path == self.hub.slow and not asked:
            for start in range(0, len(data), 1000):
                self.wfile.write(data[start : start + 1000])
                time.sleep(0.1)
        else:
            self.wfile.write(data)
        self.hub.sent[path] = self.hub.sent.get(path, 0) + len(data)

    def _sibling(self, path: str, data: bytes, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": path}
        name, lfs = oid(data)
        blob = "0" * 40 if lfs else name
        entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
        if lfs:
            entry["lfs"] = {"size": len(data), "sha256": name, "pointerSize": 134}
        return entry

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        name, lfs = oid(data)
        entry: dict[str, Any] = {
            "type": "file", "path": path, "size": len(data), "oid": name if not lfs else "0" * 40,
        }  # fmt: skip
        if lfs:
            entry["lfs"] = {"oid": name, "size": len(data), "pointerSize": 134}
        return entry

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        data = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
