"""The three ways a source may come: what each takes, what it refuses, and what a message shows."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.errors import FileError, InputError, JobStopped, SeedpodError
from app.job.source import Media, SourceLimits, fetch_source
from tests.job.web_server import WebServer, body

DATA = bytes(range(256)) * 20
TEXT = base64.b64encode(DATA).decode()
LIMITS = SourceLimits(bytes=10_000, seconds=10.0)
MEDIA: TypeAdapter[Media] = TypeAdapter(Media)


def fetch(value: Any, folder: Path, root: Path | None = None, limits: SourceLimits = LIMITS) -> Path:
    return fetch_source(MEDIA.validate_python(value), folder, limits, root, lambda: None)


def refused(kind: type[SeedpodError], code: str, action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.code == code, caught.value.message
    return caught.value.message


# ------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"url": "https://a.example/", "path": "a"},
        {"url": "https://a.example/", "base64": "AAAA"},
        {"file": "a"},
        {"url": "https://a.example/", "headers": {}},
        {"path": "a", "root": "/"},
        {"base64": "AAAA", "type": "video/mp4"},
        {"url": ""},
        {"base64": ""},
        {"path": ""},
        {"url": None},
        {"path": ["a"]},
        {"url": "https://a.example/" + "a" * 9000},
        "https://a.example/",
        ["a"],
        None,
    ],
)
def test_exactly_one_way_is_taken(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        MEDIA.validate_python(value)
    assert caught.value.error_count() == 1  # one sentence, not one for each way


def test_the_schema_describes_each_way_with_an_example() -> None:
    schema = MEDIA.json_schema()
    assert len(schema["oneOf"]) == 3
    for name, model in schema["$defs"].items():
        [(key, field)] = model["properties"].items()
        assert name == f"Media{key.title()}" and model["additionalProperties"] is False
        assert field["description"] and field["examples"]
        MEDIA.validate_python({key: field["examples"][0]})


def test_what_is_in_base64_does_not_show_in_a_log() -> None:
    assert "AAAA" not in repr(MEDIA.validate_python({"base64": "AAAA"}))


# ------------------------------------------------------------------ a URL


def test_a_url_is_fetched_and_refused_inside_by_default(tmp_path: Path) -> None:
    with WebServer({"/a": body(DATA)}) as web:
        value = {"url": f"http://127.0.0.1:{web.port}/a"}
        refused(InputError, "source_url_port", lambda: fetch(value, tmp_path))
        limits = SourceLimits(10_000, 10.0, ports=frozenset({web.port}))
        refused(InputError, "source_address_refused", lambda: fetch(value, tmp_path, limits=limits))
        assert web.requests == []
        limits = SourceLimits(10_000, 10.0, allow_private=True, ports=frozenset({web.port}))
        assert fetch(value, tmp_path, limits=limits).read_bytes() == DATA


# ------------------------------------------------------------------ base64


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        (TEXT, ""),
        (f" \n{TEXT}\t\n", ""),
        ("\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)), ""),
        (f"data:video/mp4;base64,{TEXT}", ".mp4"),
        (f"DATA:Image/PNG;name=x.exe;BASE64,{TEXT}", ".png"),
        (f"data:;base64,{TEXT}", ""),
    ],
)
def test_base64_is_decoded(tmp_path: Path, text: str, suffix: str) -> None:
    got = fetch({"base64": text}, tmp_path)
    assert got.read_bytes() == DATA
    assert got.parent == tmp_path and got.suffix == suffix


@pytest.mark.parametrize("size", [1, 2, 3, 786_431, 786_432, 786_433, 1_572_865])
def test_base64_of_any_length_is_decoded_in_blocks(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    limits = SourceLimits(bytes=size, seconds=1.0)  # and the limit is exact
    text = base64.b64encode(data).decode()
    assert fetch({"base64": text}, tmp_path, limits=limits).read_bytes() == data
    limits = SourceLimits(bytes=size - 1, seconds=1.0)
    refused(InputError, "source_too_large", lambda: fetch({"base64": text}, tmp_path, limits=limits))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("AAA", "source_base64_invalid"),
        ("A", "source_base64_invalid"),
        ("AA=", "source_base64_invalid"),
        ("AAAA=", "source_base64_invalid"),
        ("AA==AAAA", "source_base64_invalid"),
        ("====", "source_base64_invalid"),
        ("AA-_", "source_base64_invalid"),
        ("AA!A", "source_base64_invalid"),
        ("ＡＡＡＡ", "source_base64_invalid"),
        ("AAAA\0", "source_base64_invalid"),
        ("https://a.example/clip.mp4", "source_base64_invalid"),
        ("data:video/mp4,AAAA", "source_base64_invalid"),
        ("data:video/mp4;base64", "source_base64_invalid"),
        ("data:text/html;base64,AAAA", "source_wrong_type"),
        ("data:video/mp4;base64,", "source_empty"),
        ("  \n ", "source_empty"),
        ("A" * 20_000, "source_too_large"),
        ("!" * 20_000, "source_too_large"),  # told by its length, before anything is decoded
    ],
)
def test_what_is_no_base64_is_refused(tmp_path: Path, text: str, code: str) -> None:
    refused(InputError, code, lambda: fetch({"base64": text}, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_decoding_can_be_stopped(tmp_path: Path) -> None:
    def cancel() -> None:
        raise JobStopped("job_cancelled", "The job was cancelled.")

    media = MEDIA.validate_python({"base64": TEXT})
    refused(JobStopped, "job_cancelled", lambda: fetch_source(media, tmp_path, LIMITS, None, cancel))
    assert list(tmp_path.iterdir()) == []


def test_several_sources_of_a_job_have_names_of_their_own(tmp_path: Path) -> None:
    kinds = ["video/mp4", "video/mp4", "image/png"]
    paths = [fetch({"base64": f"data:{kind};base64,AAAA"}, tmp_path) for kind in kinds]
    assert [path.name for path in paths] == ["source.mp4", "source-2.mp4", "source-3.png"]


# ------------------------------------------------------------------ a path


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """An input folder with all sorts of things in it, and a secret beside it."""
    root = tmp_path / "input"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "deep" / "clip.mp4").write_bytes(DATA)
    (root / "empty.mp4").touch()
    (root / "back\\slash ü.mp4").write_bytes(DATA)
    (tmp_path / "secret.mp4").write_bytes(DATA)
    (tmp_path / "input-2").mkdir()
    (tmp_path / "input-2" / "a.mp4").write_bytes(DATA)
    os.mkfifo(root / "pipe.mp4")
    (root / "inside").symlink_to("sub/deep")
    (root / "out").symlink_to("../input-2")
    (root / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "device.mp4").symlink_to("/dev/zero")
    (root / "circle").symlink_to("circle")
    (root / "nowhere.mp4").symlink_to("missing.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root)  # the name of a socket may have 107 bytes only
        listener.bind("socket.mp4")
        os.chdir(here)
    return root


@pytest.mark.parametrize(
    "path", ["sub/deep/clip.mp4", "./sub//deep/./clip.mp4", "inside/clip.mp4", "back\\slash ü.mp4"]
)
def test_a_file_under_the_input_folder_is_used_where_it_is(mounted: Path, path: str) -> None:
    got = fetch({"path": path}, mounted, mounted, SourceLimits(bytes=1, seconds=1.0))
    assert got.read_bytes() == DATA
    assert got.is_relative_to(mounted)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../secret.mp4", "source_path_outside"),
        ("sub/../../secret.mp4", "source_path_outside"),
        ("sub/../sub/deep/clip.mp4", "source_path_outside"),
        ("..", "source_path_outside"),
        ("../input-2/a.mp4", "source_path_outside"),
        ("/etc/passwd", "source_path_outside"),
        ("//etc/passwd", "source_path_outside"),
        ("out.mp4", "source_path_outside"),
        ("out/a.mp4", "source_path_outside"),
        ("device.mp4", "source_path_outside"),
        ("circle", "source_path_outside"),
        ("circle/a.mp4", "source_path_outside"),
        ("sub\0/deep/clip.mp4", "source_path_outside"),
        ("missing.mp4", "source_path_missing"),
        ("nowhere.mp4", "source_path_missing"),
        ("sub/deep/clip.mp4/more", "source_path_missing"),
        ("~/clip.mp4", "source_path_missing"),
        ("a" * 300, "source_path_missing"),
        ("a/" * 2000, "source_path_missing"),
        ("sub", "source_path_not_file"),
        (".", "source_path_not_file"),
        ("pipe.mp4", "source_path_not_file"),
        ("socket.mp4", "source_path_not_file"),
        ("empty.mp4", "source_empty"),
    ],
)
def test_nothing_but_a_file_under_the_input_folder_is_taken(mounted: Path, path: str, code: str) -> None:
    message = refused(InputError, code, lambda: fetch({"path": path}, mounted, mounted))
    assert str(mounted.parent) not in message and "passwd" not in message.replace(repr(path), "")


def test_an_input_folder_that_is_itself_a_link_is_fine(mounted: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mounted)
    assert fetch({"path": "sub/deep/clip.mp4"}, tmp_path, tmp_path / "link").read_bytes() == DATA


@pytest.mark.parametrize("root", [None, Path("/nowhere/at/all")])
def test_without_an_input_folder_a_path_is_refused(tmp_path: Path, root: Path | None) -> None:
    message = refused(InputError, "source_no_input_folder", lambda: fetch({"path": "a.mp4"}, tmp_path, root))
    assert "/nowhere" not in message


def test_a_link_that_appears_after_the_look_is_not_followed(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race: a folder on the way is swapped for a link that leads out, between resolving and opening."""
    (mounted.parent / "input-2" / "clip.mp4").write_bytes(b"secret")
    resolve = Path.resolve

    def swapping(self: Path, strict: bool = False) -> Path:
        real = resolve(self, strict=strict)
        if real.name == "clip.mp4":
            (mounted / "sub" / "deep").rename(mounted / "sub" / "moved")
            (mounted / "sub" / "deep").symlink_to(mounted.parent / "input-2")
        return real

    monkeypatch.setattr(Path, "resolve", swapping)
    value = {"path": "sub/deep/clip.mp4"}
    refused(InputError, "source_path_outside", lambda: fetch(value, mounted, mounted))


def test_a_file_that_may_not_be_read_is_told(mounted: Path) -> None:
    (mounted / "sub" / "deep" / "clip.mp4").chmod(0)
    before = os.geteuid()
    if before == 0:  # root may read everything
        os.seteuid(65534)
    try:
        value = {"path": "sub/deep/clip.mp4"}
        message = refused(FileError, "source_path_unreadable", lambda: fetch(value, mounted, mounted))
    finally:
        os.seteuid(before)
    assert "Permission denied" in message and str(mounted) not in message
