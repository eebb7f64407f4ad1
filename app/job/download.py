"""Downloading a caller's URL to a local file, from the public internet only.

The host is resolved once, every address of it is checked, and the connection goes to a checked address:
a second answer of the resolver (DNS rebinding) is never asked for. Redirects are followed by hand, each
checked anew. The transfer runs in a thread of its own, because name lookups, TLS handshakes and headers
can each be dragged out without any timeout of a socket ever firing; the calling thread watches time,
rate and cancellation, and cuts the connection.

No proxies of the environment, no cookies, no credentials. Knows nothing of what is in the file.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote, urljoin, urlsplit

from rich.filesize import decimal

from app.errors import FileError, InputError, SeedpodError, UnavailableError, is_full
from app.job.address import (
    PORTS,
    UNESCAPED,
    Address,
    Resolver,
    Target,
    checked_addresses,
    parse_url,
    resolve_name,
)
from app.job.mediatype import may_be_media, plain_type, safe_suffix

REDIRECTS: Final = 5
WAITS: Final = (0.5, 1.5)  # seconds before the second and third try of a request
BLOCK: Final = 256 << 10  # bytes
POLL: Final = 0.1  # seconds between two looks at a running transfer
CONNECT: Final = 10.0  # seconds for one address to take a connection
_REDIRECTING: Final = (301, 302, 303, 307, 308)
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)  # status codes that may go away


@dataclass(frozen=True)
class SourceLimits:
    """What a source may cost. `bytes` of it, `seconds` to get it, and in any `window` seconds of a
    download at least `slowest` bytes per second. `allow_private` lets URLs lead to this machine and to
    private networks; `ports` are those a URL may name."""

    bytes: int
    seconds: float
    allow_private: bool = False
    ports: frozenset[int] = PORTS
    window: float = 20.0
    slowest: float = 8192.0


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True)
class Network:
    """How names are resolved and certificates checked."""

    resolve: Resolver = resolve_name
    tls: Callable[[], ssl.SSLContext] = _tls


def download(
    url: str, folder: Path, limits: SourceLimits, cancel: Callable[[], None], network: Network
) -> Path:
    """The file at `url`, in `folder` under a name of ours, with a suffix of our own table.

    `cancel` is called at least ten times a second and may raise. Whatever is raised, nothing is left in
    `folder`.

    Raises:
        InputError: `source_url_*`, `source_address_refused`, `source_redirects`, `source_not_found`,
            `source_denied`, `source_status`, `source_wrong_type`, `source_too_large`, `source_empty`.
        UnavailableError: `source_unreachable`, `source_certificate`, `source_too_slow`.
        FileError: `source_not_stored`.
    """
    file, path = new_source(folder)
    transfer = _Transfer(url, file, limits, network)
    transfer.start()
    try:
        watch = _Watch(limits, time.monotonic())
        while not transfer.finished.wait(POLL):
            cancel()
            watch.check(transfer, time.monotonic())
        if transfer.error is not None:
            raise transfer.error
        return path.rename(path.with_suffix(transfer.suffix))
    except BaseException:
        transfer.abort()
        path.unlink(missing_ok=True)
        raise


def new_source(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file in the folder of a job, called source, source-2, ...: messages name it.

    Raises:
        FileError: `source_not_stored`.
    """
    try:
        number = 1 + sum(path.name.startswith("source") for path in folder.iterdir())
        path = folder / ("source" if number == 1 else f"source-{number}")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return os.fdopen(handle, "wb"), path
    except OSError as error:
        raise not_stored(error) from None


class _PassingError(Exception):
    """A try failed in a way that another one may not; the text says how, after "it"."""


class _Transfer(threading.Thread):
    """One download in a thread. `host` is the one it talks to, `moved` the bytes of all tries."""

    def __init__(self, url: str, file: BinaryIO, limits: SourceLimits, network: Network) -> None:
        super().__init__(name="download", daemon=True)
        self.host, self.connected, self.moved, self.suffix = "the host", False, 0, ""
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self._url, self._file, self._limits, self._network = url, file, limits, network
        self._stop_asked = threading.Event()
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            with self._file:
                self._follow()
        except SeedpodError as error:
            self.error = error
        except OSError as error:
            self.error = not_stored(error)
        except BaseException as error:  # a bug: the calling thread is told
            self.error = error
        finally:
            self.finished.set()

    def abort(self) -> None:
        """Cut the connection. The thread ends by itself soon, and leaves nothing."""
        self._stop_asked.set()
        if self._socket is not None:
            with suppress(OSError):  # the plain method: that of a TLS socket is not made for two threads
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self.join(1.0)

    def _follow(self) -> None:
        """The first request and those it is redirected to."""
        target = parse_url(self._url, self._limits.ports)
        for _ in range(REDIRECTS + 1):
            self.host = target.host
            location = self._patiently(target)
            if location is None:
                return
            target = self._redirected(target, location)
        raise InputError(
            "source_redirects",
            f"The URL is redirected more than {REDIRECTS} times, the last time by {self.host}; expected the "
            "file. Give the link it ends at.",
        )

    def _redirected(self, target: Target, location: str) -> Target:
        # A header is bytes, which http.client reads as Latin-1; escaped, they are the same bytes.
        location = quote(location, safe=UNESCAPED, encoding="latin-1")
        new = parse_url(urljoin(target.url, location), self._limits.ports)
        if target.scheme == "https" and new.scheme == "http":
            raise InputError(
                "source_redirects",
                f"{target.host} redirects from https to http, where anyone in between can change the file; "
                "expected https to the end. Give the http link itself if that is meant.",
            )
        return new

    def _patiently(self, target: Target) -> str | None:
        """Where `target` redirects to, or None once its body is stored; passing failures are tried again,
        at the addresses that were checked."""
        try:
            addresses = checked_addresses(target, self._network.resolve, self._limits.allow_private)
        except OSError:
            raise UnavailableError(
                "source_unreachable",
                f"The URL's host {target.host} cannot be resolved; expected a name that DNS knows. Check its "
                "spelling.",
            ) from None
        for wait in (*WAITS, None):
            try:
                with closing(self._connect(target, addresses)) as connection:
                    return self._ask(target, connection)
            except _PassingError as error:
                if wait is None or self._stop_asked.wait(wait):
                    raise UnavailableError(
                        "source_unreachable",
                        f"The file cannot be downloaded from {target.host}: it {error}, "
                        f"{len(WAITS) + 1} times; expected the whole file. Try again later, or give another "
                        "link.",
                    ) from None
        raise AssertionError  # the loop ends by returning or raising

    def _connect(self, target: Target, addresses: tuple[Address, ...]) -> http.client.HTTPConnection:
        """A connection to the first address that takes one."""
        failure = ""
        for address in addresses:
            try:
                return self._connect_to(target, address)
            except ssl.SSLCertVerificationError as error:
                raise UnavailableError(
                    "source_certificate",
                    f"The certificate of {target.host} does not hold ({error.verify_message}); expected one "
                    "that a public authority signed for this name. Give another link.",
                ) from None
            except OSError as error:
                failure = _reason(error)
        raise _PassingError(f"took no connection ({failure})")

    def _connect_to(self, target: Target, address: Address) -> http.client.HTTPConnection:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        plain = self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if self._stop_asked.is_set():
                raise OSError(errno.ECANCELED, "stopped")
            plain.settimeout(CONNECT)
            plain.connect((str(address), target.port))
            if target.scheme == "https":
                self._socket = self._network.tls().wrap_socket(
                    plain, server_hostname=target.host, do_handshake_on_connect=False
                )
                self._socket.do_handshake()
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(2 * self._limits.window)  # the watch is to say what is wrong
        self.connected = True
        connection = http.client.HTTPConnection(str(address), target.port)
        connection.sock = self._socket
        return connection

    def _ask(self, target: Target, connection: http.client.HTTPConnection) -> str | None:
        headers = {
            "Host": target.authority,
            "User-Agent": "Seedpod",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # nothing to inflate: a bomb stays small
            "Connection": "close",
        }
        try:
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"gave no answer ({_reason(error)})") from None
        if response.status in _REDIRECTING and (location := response.headers.get("Location")):
            return location
        _check_status(target.host, response.status)
        kind = plain_type(response.headers.get("Content-Type"))
        _check_kind(target.host, kind, response.headers.get("Content-Encoding", "identity").strip().lower())
        if response.length is not None:
            check_size(response.length, self._limits.bytes)
        self._receive(target.host, response)
        self.suffix = safe_suffix(kind, urlsplit(target.path).path)
        return None

    def _receive(self, host: str, response: http.client.HTTPResponse) -> None:
        self._file.seek(0)
        self._file.truncate()
        expected, size = response.length, 0
        while block := self._read(response):
            size += len(block)
            self.moved += len(block)
            check_size(size, self._limits.bytes, partly=True)
            self._file.write(block)
        if expected not in (None, size):
            raise _PassingError(f"closed the connection after {size:,} of {expected:,} bytes")
        if size == 0:
            raise InputError("source_empty", f"{host} sent no bytes; expected a video or image.")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"broke off ({_reason(error)})") from None


class _Watch:
    """The clock of a download: its whole time, and its rate in windows that follow each other."""

    def __init__(self, limits: SourceLimits, now: float) -> None:
        self._limits, self._began = limits, now
        self._since, self._moved = now, 0

    def check(self, transfer: _Transfer, now: float) -> None:
        """
        Raises:
            UnavailableError: `source_unreachable` without a connection, else `source_too_slow`.
        """
        limits, host = self._limits, transfer.host
        if now - self._began > limits.seconds:
            raise UnavailableError(
                "source_too_slow",
                f"{host} sent {decimal(transfer.moved)} in {limits.seconds:g} s, and the file is not whole; "
                "that is the limit. Serve it from a faster host, make it smaller, or raise "
                "SEEDPOD_SOURCE_SECONDS.",
            )
        if now - self._since < limits.window:
            return
        if not transfer.connected:
            raise UnavailableError(
                "source_unreachable",
                f"{host} took no connection in {limits.window:g} s. Check the link, or try again later.",
            )
        moved = transfer.moved - self._moved
        if moved < limits.slowest * limits.window:
            raise UnavailableError(
                "source_too_slow",
                f"{host} sent {decimal(moved)} in {limits.window:g} s; expected at least "
                f"{decimal(int(limits.slowest))} a second. Serve the file from a faster host.",
            )
        self._since, self._moved = now, transfer.moved


def check_size(size: int, limit: int, *, partly: bool = False) -> None:
    """
    Raises:
        InputError: `source_too_large` if `size` bytes are more than `limit`; `partly` if there are more.
    """
    if size > limit:
        more = "more than " if partly else ""
        shown = limit if partly else size
        raise InputError(
            "source_too_large",
            f"The source has {more}{shown:,} bytes; the limit is {limit:,} ({decimal(limit)}). Send a "
            "shorter or more compressed one, or raise SEEDPOD_SOURCE_BYTES.",
        )


def _check_status(host: str, status: int) -> None:
    if status == 200:
        return
    if status in _PASSING:
        raise _PassingError(f"answers {status}")
    code, what = {
        404: ("source_not_found", "it has no such file"),
        410: ("source_not_found", "the file is gone"),
        401: ("source_denied", "it wants a login"),
        403: ("source_denied", "it forbids that"),
    }.get(status, ("source_status", "that is not the file"))
    raise InputError(
        code,
        f"{host} answers {status}: {what}; expected 200 and the file. Check that the link is whole, has not "
        "run out, and opens without a login.",
    )


def _check_kind(host: str, kind: str, encoding: str) -> None:
    if not may_be_media(kind):
        raise InputError(
            "source_wrong_type",
            f"{host} sent {kind[:60]!r}; expected a video or image. Give the link to the file itself, not to "
            "a page or playlist that shows it.",
        )
    if encoding not in ("", "identity"):
        raise InputError(
            "source_wrong_type",
            f"{host} sent the file compressed as {encoding[:20]!r}, though it was asked not to; expected it "
            "as it is. Serve it without Content-Encoding.",
        )


def not_stored(error: OSError) -> FileError:
    full = is_full(error)
    why = "the disk is full" if full else (error.strerror or "it cannot be written")
    return FileError(
        "source_not_stored",
        f"The source cannot be stored: {why}. Give the worker more room in its temporary folder, or send a "
        "smaller file.",
    )


def _reason(error: Exception) -> str:
    """Why a connection failed, without an address."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return type(error).__name__
