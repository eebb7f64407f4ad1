"""A web server on 127.0.0.1 that behaves well or badly, by path; over TLS with a certificate of its own
authority if asked to."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answer = Callable[["Handler"], None]


@dataclass
class WebServer:
    """Use as a context manager. `routes` by path, without the query."""

    routes: dict[str, Answer] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path and headers

    def __enter__(self) -> Self:
        handler = type("Bound", (Handler,), {"web": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...  # clients that hang up are what is tested


class Handler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.web.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        answer = self.web.routes.get(self.path.partition("?")[0], status(404))
        answer(self)
        self.close_connection = True

    def head(self, code: int, **headers: Any) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def reset(self) -> None:
        """Close with a reset instead of an end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def body(data: bytes, kind: str | None = "video/mp4", *, length: bool = True, **headers: Any) -> Answer:
    """`data`, with or without type and length."""

    def answer(handler: Handler) -> None:
        about = {"Content_Type": kind} if kind is not None else {}
        about |= {"Content_Length": str(len(data))} if length else {}
        handler.head(200, **about, **headers)
        handler.wfile.write(data)

    return answer


def chunked(data: bytes, size: int = 1000) -> Answer:
    """`data` in chunks."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Type="video/mp4", Transfer_Encoding="chunked")
        for begin in range(0, len(data), size):
            piece = data[begin : begin + size]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return answer


def status(code: int, **headers: Any) -> Answer:
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other; the last one from then on."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def drip(piece: bytes, pause: float, *, until: threading.Event, headers: bool = False) -> Answer:
    """A byte or so at a time, without end: as a body, or as headers that never finish."""

    def answer(handler: Handler) -> None:
        if headers:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        else:
            handler.head(200, Content_Type="video/mp4", Content_Length=10_000)
        while not until.wait(pause):
            handler.wfile.write(b"X-A: b\r\n" if headers else piece)

    return answer


def cut_off(data: bytes, announced: int, *, reset: bool = False) -> Answer:
    """Fewer bytes than announced, ended by a close or a reset."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Type="video/mp4", Content_Length=announced)
        handler.wfile.write(data)
        if reset:
            handler.reset()

    return answer


def certificate(folder: Path, *names: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, a client's that trusts it) for a certificate that holds for `names`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
    now = datetime.datetime.now(datetime.UTC)
    held = [x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(held), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "public.pem", folder / "private.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(public, private)
    return server, ssl.create_default_context(cafile=str(public))
