"""A hub on 127.0.0.1: the part of the protocol that a download needs, with faults on demand.

HEAD and GET /{owner}/{name}/resolve/{revision}/{file} answer as the hub does: `X-Repo-Commit`, `ETag`,
`X-Linked-Size` and `X-Linked-ETag` and a redirect to a CDN for large files, `X-Error-Code` for errors.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

COMMIT = "37255ff8cccfb01071b87f635a5948ca8d53117c"
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    begin: int  # of its Range, 0 without one
    authorization: str | None
    host: str


@dataclass
class HubServer:
    """Use as a context manager. What `faults` says happens to the next requests, one each."""

    repo: str = "owner/model"
    files: dict[str, bytes] = field(default_factory=dict)
    small: frozenset[str] = frozenset()  # files without a hash and a redirect, as the hub keeps in git
    token: str | None = None  # what a request must carry
    address: str = "127.0.0.1"
    cdn: str = "localhost"  # another name for this machine is another origin, as a CDN is
    ranges: bool = True
    announce: int | None = None  # a size other than the true one
    sent_instead: bytes | None = None  # bytes other than those announced
    cuts: list[int] = field(default_factory=list)  # bytes after which the next bodies end
    statuses: list[int] = field(default_factory=list)  # what the next requests are answered with
    requests: list[Request] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer((self.address, 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    def bodies(self) -> list[Request]:
        """The requests that asked for bytes, where those are."""
        return [r for r in self.requests if r.method == "GET" and "/resolve/" not in r.path]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        span = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(span[1]) if span and hub.ranges else 0
        sent = self.headers.get("Authorization"), self.headers.get("Host", "").split(":")[0]
        hub.requests.append(Request(self.command, self.path, int(span[1]) if span else 0, *sent))
        if hub.statuses and (status := hub.statuses.pop(0)) != 200:
            self._finish(status)
        elif self.path.startswith("/cdn/"):
            name = self.path.removeprefix("/cdn/").split("?")[0]
            self._body(hub.files[name], begin, self._linked(name))
        elif match := RESOLVE.fullmatch(self.path):
            self._resolve(*match.groups(), begin)
        else:
            self._finish(404)

    def _resolve(self, repo: str, revision: str, name: str, begin: int) -> None:
        hub = self.hub
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._finish(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repo != hub.repo:
            self._finish(401 if hub.token is None else 404, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (COMMIT, "main"):
            self._finish(404, {"X-Error-Code": "RevisionNotFound"})
        elif name not in hub.files:
            self._finish(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif name in hub.small:
            etag = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(hub.files[name]).hexdigest()}"'}
            self._body(hub.files[name], begin, etag)
        else:
            location = f"http://{hub.cdn}:{hub.port}/cdn/{name}?signature=do-not-show"
            self._finish(302, {**self._linked(name), "ETag": '"of-the-redirect"', "Location": location})

    def _linked(self, name: str) -> dict[str, str]:
        """The headers about a large file; a CDN of the hub's own origin repeats them."""
        data, announce = self.hub.files[name], self.hub.announce
        return {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data) if announce is None else announce),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        }

    def _body(self, data: bytes, begin: int, headers: dict[str, str] | None = None) -> None:
        hub = self.hub
        data = data if hub.sent_instead is None or self.command == "HEAD" else hub.sent_instead
        headers = {"Accept-Ranges": "bytes"} | (headers or {})
        if begin >= len(data) and begin:
            self._finish(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send_response(206 if begin else 200)
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        for key, value in {**headers, "Content-Length": str(len(data) - begin)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = data[begin:]
        if hub.cuts:
            rest = rest[: hub.cuts.pop(0)]
            self.close_connection = True
        hub.sent += len(rest)
        try:
            self.wfile.write(rest)
        except ConnectionError:  # the other side was stopped
            self.close_connection = True

    def _finish(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()
