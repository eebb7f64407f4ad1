"""Downloads from a real server: what arrives, what is refused, and that the checked address is the one
that is connected to."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import InputError, JobStopped, SeedpodError, UnavailableError
from app.job import download as module
from app.job.download import Network, SourceLimits, download
from tests.job.web_server import Answer, WebServer, body, certificate, chunked, cut_off, drip, in_turn, status

DATA = bytes(range(256)) * 400  # 102,400 bytes
LIMIT = 200_000


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))


class Names:
    """A resolver that gives the next answer of its list each time, and remembers what it was asked."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers, self.asked = list(answers), list[str]()

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if not self._answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self._answers.pop(0)


def get(
    url: str,
    folder: Path,
    *,
    ports: set[int] | None = None,
    network: Network | None = None,
    cancel: Callable[[], None] = lambda: None,
    **limits: Any,
) -> Path:
    port = int(url.split("/")[2].rpartition(":")[2])
    known = {"bytes": LIMIT, "seconds": 10.0, "allow_private": True, "ports": frozenset(ports or {port})}
    return download(url, folder, SourceLimits(**{**known, **limits}), cancel, network or Network())


def refused(kind: type[SeedpodError], code: str, folder: Path, action: Callable[[], object]) -> str:
    """The message; nothing is left in `folder`, and no thread."""
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.code == code, caught.value.message
    assert list(folder.iterdir()) == []
    assert str(folder) not in caught.value.message
    return caught.value.message


def link(web: WebServer, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{web.port}{path}"


# ------------------------------------------------------------------ what arrives


@pytest.mark.parametrize(
    ("path", "answer", "suffix"),
    [
        ("/clip.MP4", body(DATA), ".mp4"),
        ("/a.mov", body(DATA, "application/octet-stream"), ".mov"),
        ("/a.mov", body(DATA, "video/webm; codecs=vp9"), ".webm"),
        ("/a", body(DATA, None), ""),
        ("/a.exe", body(DATA, "binary/octet-stream"), ""),
        ("/a.php/x.sh%00.mp4", body(DATA, "image/jpeg", Content_Encoding="identity"), ".jpg"),
        ("/a.jpeg?b=c.exe", body(DATA, None, length=False), ".jpg"),
        ("/a", chunked(DATA), ".mp4"),
    ],
)
def test_the_file_arrives_whole_under_a_name_of_ours(
    web: WebServer, tmp_path: Path, path: str, answer: Answer, suffix: str
) -> None:
    web.routes = {path.partition("?")[0]: answer}
    got = get(link(web, path), tmp_path)
    assert got.read_bytes() == DATA
    assert got.parent == tmp_path and got.name == f"source{suffix}"
    assert got.stat().st_mode & 0o777 == 0o600


def test_the_request_says_little_and_asks_for_plain_bytes(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked
    web.routes = {"/a": body(DATA)}
    get(link(web, "/a?token=%2Fx&b", "clips.example"), tmp_path, network=Network(Names(["127.0.0.1"])))
    [(path, headers)] = web.requests
    assert path == "/a?token=%2Fx&b"
    assert headers == {
        "host": f"clips.example:{web.port}",
        "user-agent": "Seedpod",
        "accept": "*/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


# ------------------------------------------------------------------ where it connects to


def test_the_name_is_resolved_once_and_the_checked_address_is_connected_to(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: a first answer that is public, then one that leads inside. Under the policy of
    production, with the network's far end bent to the server."""
    web.routes = {"/a": in_turn(status(503), body(DATA))}  # a second try does not ask the resolver again
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    connected: list[tuple[str, int]] = []
    connect = socket.socket.connect

    def bent(self: socket.socket, address: tuple[str, int]) -> None:
        connected.append(address)
        connect(self, ("127.0.0.1", web.port))

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("asked the system's resolver")

    monkeypatch.setattr(socket.socket, "connect", bent)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    url = link(web, "/a", "rebind.example")
    assert get(url, tmp_path, network=Network(names), allow_private=False).read_bytes() == DATA
    assert names.asked == ["rebind.example"]
    assert connected == [("93.184.216.34", web.port)] * 2


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1"], ["169.254.169.254"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"]],
)
def test_a_name_that_leads_inside_is_refused_before_any_connection(
    web: WebServer, tmp_path: Path, addresses: list[str]
) -> None:
    network = Network(Names(addresses))
    url = link(web, "/a", "inner.example")
    refused(
        InputError, "source_address_refused", tmp_path,
        lambda: get(url, tmp_path, network=network, allow_private=False),
    )  # fmt: skip
    assert web.requests == []


def test_a_redirect_is_checked_like_the_first_url(web: WebServer, tmp_path: Path) -> None:
    inside = {
        "/private": ("http://inner.example:%d/", "source_address_refused"),
        "/metadata": ("http://169.254.169.254:%d/latest/meta-data/", "source_address_refused"),
        "/decimal": ("http://2852039166:%d/", "source_url_invalid"),
        "/file": ("file:///etc/passwd", "source_url_scheme"),
        "/user": ("http://a:b@clips.example:%d/", "source_url_credentials"),
        "/port": ("http://clips.example:1/", "source_url_port"),
    }
    for path, (location, code) in inside.items():
        location = location % web.port if "%d" in location else location
        web.routes = {path: status(302, Location=location)}
        names = Names(["127.0.0.1"], ["169.254.169.254"])
        url = link(web, path, "clips.example")
        refused(InputError, code, tmp_path, lambda: get(url, tmp_path, network=Network(names)))  # noqa: B023
    assert len(web.requests) == len(inside)


def test_redirects_are_followed_to_the_file_a_limited_number_of_times(web: WebServer, tmp_path: Path) -> None:
    codes = (301, 302, 303, 307, 308)
    web.routes = {
        f"/{n}": status(code, Location=f"../{n + 1}?a=\xe9 b") for n, code in enumerate(codes)
    }  # relative, and as raw as servers send them
    web.routes["/5"] = body(DATA)
    assert get(link(web, "/0"), tmp_path).read_bytes() == DATA
    assert web.paths() == ["/0", *(f"/{n}?a=%E9%20b" for n in range(1, 6))]
    web.routes["/5"] = status(302, Location="/6")
    web.routes["/6"] = body(DATA)
    for file in tmp_path.iterdir():
        file.unlink()
    refused(InputError, "source_redirects", tmp_path, lambda: get(link(web, "/0"), tmp_path))
    assert "/6" not in web.paths()


def test_the_next_address_is_tried_when_one_takes_no_connection(web: WebServer, tmp_path: Path) -> None:
    web.routes = {"/a": body(DATA)}
    names = Names(["127.0.0.9", "127.0.0.1"])  # the server listens on the second only
    assert get(link(web, "/a", "two.example"), tmp_path, network=Network(names)).read_bytes() == DATA


# ------------------------------------------------------------------ TLS


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WebServer, Network]]:
    server, client = certificate(tmp_path_factory.mktemp("tls"), "clips.example")
    with WebServer({"/a": body(DATA)}, tls=server) as web:
        yield web, Network(Names(["127.0.0.1"], ["127.0.0.1"]), lambda: client)


def test_tls_checks_the_name_of_the_url_not_the_address(
    secure: tuple[WebServer, Network], tmp_path: Path
) -> None:
    web, network = secure
    got = get(f"https://clips.example:{web.port}/a", tmp_path, network=network)
    assert got.read_bytes() == DATA
    got.unlink()
    message = refused(
        UnavailableError, "source_certificate", tmp_path,
        lambda: get(f"https://other.example:{web.port}/a", tmp_path, network=network),
    )  # fmt: skip
    assert "other.example" in message
    assert len(web.requests) == 1


def test_a_certificate_that_nobody_knows_is_refused(
    secure: tuple[WebServer, Network], tmp_path: Path
) -> None:
    web, _ = secure
    network = Network(Names(["127.0.0.1"]))
    url = f"https://clips.example:{web.port}/a"
    refused(UnavailableError, "source_certificate", tmp_path, lambda: get(url, tmp_path, network=network))


def test_a_redirect_from_https_to_http_is_refused(secure: tuple[WebServer, Network], tmp_path: Path) -> None:
    web, network = secure
    web.routes = {"/a": status(302, Location=f"http://clips.example:{web.port}/b")}
    url = f"https://clips.example:{web.port}/a"
    message = refused(InputError, "source_redirects", tmp_path, lambda: get(url, tmp_path, network=network))
    assert "https to http" in message


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (body(DATA * 2), "source_too_large"),  # by its length
        (body(DATA * 2, length=False), "source_too_large"),  # by counting
        (chunked(DATA * 2), "source_too_large"),
        (status(200, Content_Type="video/mp4"), "source_empty"),
        (body(DATA, "text/html; charset=utf-8"), "source_wrong_type"),
        (body(DATA, "application/json"), "source_wrong_type"),
        (body(DATA, "image/svg+xml"), "source_wrong_type"),
        (body(DATA, "application/vnd.apple.mpegurl"), "source_wrong_type"),
        (body(DATA, "audio/mpeg"), "source_wrong_type"),
        (body(gzip.compress(DATA), Content_Encoding="gzip"), "source_wrong_type"),
        (status(404), "source_not_found"),
        (status(410), "source_not_found"),
        (status(401), "source_denied"),
        (status(403), "source_denied"),
        (status(400), "source_status"),
        (status(204), "source_status"),
        (status(206), "source_status"),
        (status(304), "source_status"),
        (status(302), "source_status"),  # without a place
    ],
)
def test_an_answer_that_is_not_the_file_is_refused(
    web: WebServer, tmp_path: Path, answer: Answer, code: str
) -> None:
    web.routes = {"/a": answer}
    message = refused(
        InputError, code, tmp_path, lambda: get(link(web, "/a?signature=do-not-show"), tmp_path)
    )
    assert "do-not-show" not in message
    assert len(web.requests) == 1  # none of these is tried again


@pytest.mark.parametrize(
    "first", [status(500), status(503), status(429), cut_off(DATA[:5000], len(DATA)),
              cut_off(DATA[:5000], len(DATA), reset=True), lambda handler: handler.reset()]
)  # fmt: skip
def test_what_may_pass_is_tried_again_and_then_given_up(
    web: WebServer, tmp_path: Path, first: Answer
) -> None:
    web.routes = {"/a": in_turn(first, first, body(DATA))}
    got = get(link(web, "/a"), tmp_path)
    assert got.read_bytes() == DATA
    got.unlink()
    web.routes = {"/a": first}
    refused(UnavailableError, "source_unreachable", tmp_path, lambda: get(link(web, "/a"), tmp_path))
    assert len(web.requests) == 6


def test_a_later_try_leaves_nothing_of_an_earlier_one(web: WebServer, tmp_path: Path) -> None:
    web.routes = {"/a": in_turn(cut_off(b"y" * 150_000, 160_000), body(DATA))}
    assert get(link(web, "/a"), tmp_path).read_bytes() == DATA


def test_a_length_that_is_too_much_is_refused_before_the_first_byte(web: WebServer, tmp_path: Path) -> None:
    done = threading.Event()
    web.routes = {"/a": drip(b"x", 0.02, until=done)}  # announces 10,000 bytes
    begin = time.monotonic()
    message = refused(
        InputError, "source_too_large", tmp_path, lambda: get(link(web, "/a"), tmp_path, bytes=9_999)
    )
    assert "has 10,000 bytes" in message
    assert time.monotonic() - begin < 1.5
    done.set()


def test_a_host_without_a_name_or_a_listener_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url, network = f"http://clips.example:{unused.getsockname()[1]}/a", Network(Names(["127.0.0.1"]))
        message = refused(
            UnavailableError, "source_unreachable", tmp_path, lambda: get(url, tmp_path, network=network)
        )
    assert "Connection refused" in message
    assert "127.0.0.1" not in message
    message = refused(
        UnavailableError, "source_unreachable", tmp_path, lambda: get(url, tmp_path, network=Network(Names()))
    )
    assert "cannot be resolved" in message


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("headers", [False, True])
def test_a_slow_drip_is_cut_after_a_window(web: WebServer, tmp_path: Path, headers: bool) -> None:
    done = threading.Event()
    web.routes = {"/a": drip(b"x", 0.02, until=done, headers=headers)}
    begin = time.monotonic()
    refused(
        UnavailableError, "source_too_slow", tmp_path,
        lambda: get(link(web, "/a"), tmp_path, window=0.5, slowest=1000.0),
    )  # fmt: skip
    assert 0.4 < time.monotonic() - begin < 2
    done.set()


def test_the_whole_time_is_limited_even_at_a_good_rate(web: WebServer, tmp_path: Path) -> None:
    done = threading.Event()
    web.routes = {"/a": drip(b"x" * 100, 0.02, until=done)}
    begin = time.monotonic()
    message = refused(
        UnavailableError, "source_too_slow", tmp_path,
        lambda: get(link(web, "/a"), tmp_path, seconds=0.8, window=0.4, slowest=100.0),
    )  # fmt: skip
    assert 0.7 < time.monotonic() - begin < 2.5
    assert "0.8 s" in message
    done.set()


def test_a_resolver_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    done = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        done.wait(10)
        return ["127.0.0.1"]

    begin = time.monotonic()
    refused(
        UnavailableError, "source_unreachable", tmp_path,
        lambda: get("http://slow.example:80/", tmp_path, network=Network(hang), window=0.3),
    )  # fmt: skip
    assert time.monotonic() - begin < 2.5
    done.set()


def test_cancelling_takes_effect_at_once_and_cuts_the_connection(web: WebServer, tmp_path: Path) -> None:
    done = threading.Event()
    hung_up = threading.Event()
    inner = drip(b"x", 0.02, until=done)

    def answer(handler: Any) -> None:
        try:
            inner(handler)
        except ConnectionError:
            hung_up.set()

    web.routes = {"/a": answer}
    begin = time.monotonic()

    def cancel() -> None:
        if time.monotonic() - begin > 0.3:
            raise JobStopped("job_cancelled", "The job was cancelled.")

    refused(JobStopped, "job_cancelled", tmp_path, lambda: get(link(web, "/a"), tmp_path, cancel=cancel))
    assert time.monotonic() - begin < 1.5
    assert hung_up.wait(2)
    assert not [t for t in threading.enumerate() if t.name == "download"]
    done.set()
