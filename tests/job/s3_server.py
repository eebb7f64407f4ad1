"""An S3 server of its own process on 127.0.0.1 (moto's), with keys and their check, and a proxy in front of
it that fails on demand."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.request import Request, urlopen

import boto3
from botocore.config import Config
from pydantic import SecretStr

from app.job.bucket import Bucket

NAME = "results"


class S3Server:
    """Use as a context manager. It has one bucket, and one user who may do everything to it."""

    def __enter__(self) -> Self:
        # The process takes any free port and says which.
        program = (
            "from moto.server import DomainDispatcherApplication, create_backend_app\n"
            "from werkzeug.serving import make_server\n"
            "app = DomainDispatcherApplication(create_backend_app)\n"
            "server = make_server('127.0.0.1', 0, app, threaded=True)\n"
            "print(server.server_port, flush=True)\n"
            "server.serve_forever()\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        iam = self.client("iam")
        iam.create_user(UserName="worker")
        everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
        iam.put_user_policy(UserName="worker", PolicyName="all", PolicyDocument=policy)
        self.keys = iam.create_access_key(UserName="worker")["AccessKey"]
        self.client().create_bucket(Bucket=NAME)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, service: str = "s3") -> Any:
        """A client of the test's own."""
        keys = getattr(self, "keys", {"AccessKeyId": "any", "SecretAccessKey": "any"})
        return boto3.session.Session().client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            config=Config(s3={"addressing_style": "path"}),
        )

    def bucket(self, **other: Any) -> Bucket:
        """The bucket as the settings would give it."""
        known = {
            "endpoint": self.endpoint,
            "name": NAME,
            "region": "us-east-1",
            "access_key": SecretStr(self.keys["AccessKeyId"]),
            "secret_key": SecretStr(self.keys["SecretAccessKey"]),
            "attempts": 3,
        }
        return Bucket(**{**known, **other})

    @contextmanager
    def checking_keys(self) -> Iterator[None]:
        """Signatures are checked meanwhile. (Not those of links: the server cannot.)"""
        self._check_from_now(b"0")
        try:
            yield
        finally:
            self._check_from_now(b"inf")

    def _check_from_now(self, requests: bytes) -> None:
        plain = {"Content-Type": "text/plain"}
        urlopen(Request(f"{self.endpoint}/moto-api/reset-auth", requests, plain)).close()


@dataclass
class Proxy:
    """Hands requests on to `port`; what `faults` says happens to the next ones, one each: a status, or 0
    for a connection that is closed without an answer. `delay` seconds before each. Use as a context
    manager."""

    port: int
    faults: list[int] = field(default_factory=list)
    delay: float = 0.0
    requests: list[str] = field(default_factory=list)  # "PUT /results/key?..."

    def __enter__(self) -> Self:
        handler = type("Bound", (_Handler,), {"proxy": self})
        self._server = _ProxyServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: ...  # clients that hang up are what is tested


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _pass_on(self) -> None:
        proxy = self.proxy
        proxy.requests.append(f"{self.command} {self.path}")
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(proxy.delay)
        fault = proxy.faults.pop(0) if proxy.faults else None
        if fault == 0:
            self.close_connection = True
            return
        if fault is not None:
            self._answer(fault, [], b"")
            return
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        self._answer(response.status, response.getheaders(), response.read())
        connection.close()

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_PUT(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def do_DELETE(self) -> None:
        self._pass_on()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
