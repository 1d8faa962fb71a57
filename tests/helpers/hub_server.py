"""A hub on this machine: the part of Hugging Face's protocol that downloads use, with faults on request.

``GET /api/models/REPO[/revision/REV]`` lists the files; ``HEAD`` and ``GET /REPO/resolve/REV/FILE`` give a small file,
or for a large one (``lfs``) a redirect to ``/cdn/SHA256`` under another host name, which understands ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef" * 2 + "01234567"


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """Repositories, requests so far, and what shall go wrong.

    Args:
        address: Where it listens.
        repos: Repository -> file -> content.
        commit: The commit that ``main`` is.
        lfs: Suffixes of the files that are stored as large ones.
        cut_after: Bytes of a large file after which the connection drops; used up by one transfer.
        stall_after: The same, but the connection stays open and nothing more comes.
        refuse_ranges: Answer a request for a range with the whole file.
        sent: Content that is sent in place of the true one, by file.
        status: Status and X-Error-Code of every answer, in place of the true ones.
        token: The only token that is let in; None lets everyone in.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commit: str = COMMIT
    lfs: tuple[str, ...] = (".safetensors", ".pt")
    cut_after: int | None = None
    stall_after: int | None = None
    refuse_ranges: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)
    status: tuple[int, str] | None = None
    token: str | None = None
    requests: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def transfers(self) -> list[Request]:
        """The requests for content, in order."""
        return [request for request in self.requests if request.method == "GET" and "/api/" not in request.path]

    def is_large(self, name: str) -> bool:
        """Whether a file is stored as a large one."""
        return name.endswith(self.lfs)


def git_hash(content: bytes) -> str:
    """The hash under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The SHA-256 in digits."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(repos: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """Run a hub with the given repositories on a free port of this machine until the block ends."""
    hub = FakeHub(repos=repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients are killed on purpose


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if hub.status is not None:
            return self._refuse(*hub.status)
        if path.startswith("/cdn/"):
            return self._send_content(path.removeprefix("/cdn/"))
        if hub.token is not None and token != hub.token:
            return self._refuse(401, "" if token else "RepoNotFound", "Invalid credentials in Authorization header")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (listing or file)[1], (listing or file)[2] if listing or file else None
        if repo not in hub.repos:
            return self._refuse(404, "RepoNotFound")
        if revision not in (None, "main", hub.commit):
            return self._refuse(404, "RevisionNotFound")
        if listing:
            return self._send_listing(repo)
        if file[3] not in hub.repos[repo]:
            return self._refuse(404, "EntryNotFound")
        return self._send_file(repo, file[3])

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message and not code:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_listing(self, repo: str) -> None:
        siblings = []
        for name, content in self.hub.repos[repo].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if self.hub.is_large(name):
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repo: str, name: str) -> None:
        content = self.hub.repos[repo][name]
        large = self.hub.is_large(name)
        body = b"" if large else self.hub.sent.get(name, content)
        self.send_response(302 if large else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{git_hash(content)}"')
        if large:
            self.send_header("X-Linked-Etag", f'"{sha256(content)}"')
            self.send_header("X-Linked-Size", str(len(content)))
            elsewhere = self.hub.address.replace("127.0.0.1", "localhost")
            self.send_header("Location", f"{elsewhere}/cdn/{sha256(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _send_content(self, digest: str) -> None:
        hub = self.hub
        name, content = next((n, c) for repo in hub.repos.values() for n, c in repo.items() if sha256(c) == digest)
        content = hub.sent.get(name, content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(asked[1]) if asked and not hub.refuse_ranges else 0
        if first >= len(content):
            return self._refuse(416)
        body = content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if hub.cut_after is not None:
            self.wfile.write(body[: hub.cut_after])
            self.wfile.flush()
            hub.cut_after = None
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif hub.stall_after is not None:
            self.wfile.write(body[: hub.stall_after])
            self.wfile.flush()
            hub.stall_after = None
            hub.stalled.set()
            hub.stop.wait(30)
        else:
            self.wfile.write(body)
