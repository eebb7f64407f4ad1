"""Fetching from a real server that speaks the hub's protocol, over real sockets."""

import errno
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

import app.boot.fetch as module
from app.boot.fetch import KEEP, TRIES, fetch
from app.boot.hub import Hub, InterruptedDownloadError
from app.boot.manifest import FileEntry, Origin
from app.errors import SeedpodError
from tests.boot.hub_server import COMMIT, HubServer
from tests.boot.places import Recorder, mounted

DATA = random.Random(3).randbytes(3_000_017)
SHA256 = hashlib.sha256(DATA).hexdigest()
ENTRY = FileEntry(
    name="model.pth",
    path=PurePosixPath("ckpts/model/model.pth"),
    format="torch",
    size=len(DATA),
    sha256=SHA256,
    origin=Origin("owner/model", COMMIT, "weights/model.pth"),
)
SECRET = "hf_thisIsNotToBeSeen"


@pytest.fixture
def hub():
    with HubServer(files={"weights/model.pth": DATA, "config.json": b'{"a": 1}'}) as server:
        server.small = frozenset(["config.json"])
        yield server


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def fetched(hub, root, entry=ENTRY, progress=None, token=None, endpoint=None) -> Path:
    return fetch(
        entry, root, endpoint=endpoint or hub.endpoint, token=token, progress=progress or Recorder(), wait=0.0
    )


def failure(*args, **kwargs) -> SeedpodError:
    with pytest.raises(SeedpodError) as caught:
        fetched(*args, **kwargs)
    return caught.value


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


def partial(root: Path) -> Path | None:
    return next((root / ".seedpod/downloads").glob("*.partial"), None)


def test_a_file_lands_whole_at_its_path(hub, root):
    progress = Recorder()
    path = fetched(hub, root, progress=progress)
    assert path == root / "ckpts/model/model.pth"
    assert path.read_bytes() == DATA
    assert files(root) == ["ckpts/model/model.pth"]
    assert (progress.done, progress.total) == (len(DATA), len(DATA))
    assert progress.labels == ["fetch model.pth"] and SHA256 in progress.notes[0]
    assert hub.sent == len(DATA)


def test_the_revision_is_pinned(hub, root):
    fetched(hub, root)
    assert {r.path for r in hub.requests if "/resolve/" in r.path} == {
        f"/owner/model/resolve/{COMMIT}/weights/model.pth"
    }


def test_without_a_revision_every_byte_comes_from_the_commit_that_main_is(hub, root):
    fetched(hub, root, replace(ENTRY, origin=Origin("owner/model", None, "weights/model.pth")))
    asked = [r.path.split("/")[4] for r in hub.requests if "/resolve/" in r.path]
    assert asked == ["main", COMMIT]


def test_a_small_file_without_size_and_hash(hub, root):
    entry = FileEntry(
        "config", PurePosixPath("m/config.json"), "data", origin=Origin("owner/model", COMMIT, "config.json")
    )
    assert fetched(hub, root, entry).read_bytes() == b'{"a": 1}'


def test_a_right_file_is_not_downloaded_again(hub, root):
    fetched(hub, root)
    hub.requests.clear()
    assert fetched(hub, root).read_bytes() == DATA
    assert hub.requests == []


# ------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("cuts", [[1_000_000], [0, 1, 2_999_999], [500_000] * 5])
def test_an_interruption_is_gone_on_from_and_no_byte_comes_twice(hub, root, cuts):
    hub.cuts = list(cuts)
    progress = Recorder()
    assert fetched(hub, root, progress=progress).read_bytes() == DATA
    begins = [0]
    for cut in cuts:
        begins.append(begins[-1] + cut)
    assert [r.begin for r in hub.bodies()] == [b for b in begins if b < len(DATA)][: len(hub.bodies())]
    assert hub.sent == len(DATA) == progress.done


def test_a_hub_that_stays_away_is_an_error_and_the_next_run_goes_on(hub, root):
    hub.cuts = [1_200_000]
    hub.statuses = [200, 200, 200] + [503] * TRIES
    error = failure(hub, root)
    assert (error.code, error.exit_status) == ("fetch_unreachable", 69)
    assert "503" in error.message and "1.2 MB are kept" in error.message
    assert partial(root).stat().st_size == 1_200_000 and not (root / ENTRY.path).exists()
    assert fetched(hub, root).read_bytes() == DATA
    assert hub.bodies()[-1].begin == 1_200_000
    assert hub.sent == len(DATA)
    assert files(root) == ["ckpts/model/model.pth"]


CHILD = """
import os, signal, sys
from pathlib import Path
from tests.boot.places import Recorder
from tests.boot.test_fetch import ENTRY, fetch
die = lambda done: os.kill(os.getpid(), signal.SIGKILL) if done > 1_500_000 else None
fetch(ENTRY, Path(sys.argv[1]), endpoint=sys.argv[2], token=None, progress=Recorder(die))
"""


def test_killed_in_the_middle_nothing_is_in_place_and_the_next_run_gives_the_file(hub, root, monkeypatch):
    command = [sys.executable, "-c", CHILD, str(root), hub.endpoint]
    project = Path(module.__file__).parents[2]
    assert subprocess.run(command, cwd=project, timeout=60).returncode == -signal.SIGKILL
    assert not (root / ENTRY.path).exists()
    assert fetched(hub, root).read_bytes() == DATA
    assert files(root) == ["ckpts/model/model.pth"]


def test_a_server_without_ranges_sends_it_all_again(hub, root):
    hub.ranges, hub.cuts = False, [2_000_000]
    progress = Recorder()
    assert fetched(hub, root, progress=progress).read_bytes() == DATA
    assert hub.sent == len(DATA) + 2_000_000
    assert progress.done == len(DATA)


@pytest.mark.parametrize("left", [DATA + b"more", DATA[:1000] + b"X" + DATA[1001:2000]])
def test_a_partial_file_that_is_not_a_beginning_never_becomes_the_file(hub, root, left):
    """Longer than the file, or damaged: one is begun anew, the other found by its hash and removed."""
    hub.cuts = [0] * TRIES
    failure(hub, root)
    partial(root).write_bytes(left)
    if len(left) < len(DATA):
        error = failure(hub, root)
        assert error.code == "fetch_hash_mismatch" and SHA256 in error.message
        assert files(root) == []
    assert fetched(hub, root).read_bytes() == DATA


def test_of_two_at_once_one_downloads(hub, root):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetched(hub, root))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert paths == [root / ENTRY.path] * 3
    assert hub.sent == len(DATA)


def test_an_unanswered_request_is_an_interruption(hub):
    with HubServer() as silent:
        silent._server.shutdown()  # accepts connections, never answers
        began = time.monotonic()
        with pytest.raises(InterruptedDownloadError, match=r"no answer for 0\.3 s"):
            Hub(silent.endpoint, None, timeout=0.3).look(ENTRY.origin)
        assert time.monotonic() - began < 5


# ------------------------------------------------------------------ refused, or wrong


def asking(**changes) -> FileEntry:
    return replace(ENTRY, origin=replace(ENTRY.origin, **changes))


@pytest.mark.parametrize(
    ("entry", "code", "named"),
    [
        (asking(filename="weights/other.pth"), "fetch_not_found", "weights/other.pth"),
        (asking(revision="0" * 40), "fetch_not_found", "0" * 40),
        (asking(repo="owner/nothing"), "fetch_denied", "owner/nothing"),  # the hub tells strangers no more
        (replace(ENTRY, size=12), "fetch_size_mismatch", "the manifest expects 12"),
        (replace(ENTRY, sha256="ab" * 32), "fetch_hash_mismatch", "ab" * 32),
        (replace(ENTRY, origin=None), "fetch_no_origin", str(ENTRY.path)),
    ],
)
def test_what_is_refused_before_a_byte_is_downloaded(hub, root, entry, code, named):
    error = failure(hub, root, entry)
    assert (error.code, error.exit_status) == (code, 78)
    assert named in error.message
    assert hub.sent == 0 and files(root) == []


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"?", DATA + b"more", b"<html>sign in</html>"])
def test_wrong_bytes_are_removed_and_never_land(hub, root, wrong):
    hub.sent_instead = wrong
    entry = ENTRY
    if len(wrong) < len(DATA):  # only a hash can tell: neither side knows the size
        hub.small, entry = frozenset(hub.files), replace(ENTRY, size=None)
        hub.files["weights/model.pth"] = wrong
    error = failure(hub, root, entry)
    assert (error.code, error.exit_status) == ("fetch_hash_mismatch", 78)
    assert SHA256 in error.message and "removed" in error.message
    assert files(root) == []


@pytest.mark.parametrize("token", [None, SECRET + "wrong"])
def test_a_gated_repository_names_the_variable_and_never_the_token(hub, root, token, caplog):
    caplog.set_level(logging.DEBUG)
    hub.token = SECRET
    error = failure(hub, root, token=token)
    assert (error.code, error.exit_status) == ("fetch_denied", 78)
    assert "HF_TOKEN" in error.message and "owner/model" in error.message
    assert ("is not accepted" if token else "none was given") in error.message
    assert SECRET not in error.message + repr(error.__context__) + caplog.text


@pytest.mark.parametrize("cdn", ["127.0.0.1", "localhost"])
def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, root, cdn):
    hub.token, hub.cdn = SECRET, cdn
    assert fetched(hub, root, token=SECRET).read_bytes() == DATA
    assert {r.authorization for r in hub.requests if "/resolve/" in r.path} == {f"Bearer {SECRET}"}
    body = hub.bodies()[0]
    assert body.host == cdn
    assert body.authorization == (f"Bearer {SECRET}" if cdn == "127.0.0.1" else None)


def test_no_message_holds_the_token_or_a_signed_address(hub, root):
    hub.cuts, hub.statuses = [1000], [200, 200, 200] + [503] * TRIES
    error = failure(hub, root, token=SECRET)
    endpoint = hub.endpoint.replace("http://", "http://user:password@")
    other = failure(hub, root, asking(revision="0" * 40), token=SECRET, endpoint=endpoint)
    for word in (SECRET, "signature", "do-not-show", "password"):
        assert word not in error.message + other.message


@pytest.mark.parametrize("token", ["hf_two\nlines", "hf_…"])
def test_a_token_that_is_none_is_refused_unseen(hub, root, token):
    error = failure(hub, root, token=token)
    assert error.code == "fetch_denied" and "hf_two" not in error.message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("endpoint", "code"),
    [
        ("http://127.0.0.1:9", "fetch_unreachable"),
        ("huggingface.co", "fetch_refused"),
        ("ftp://x", "fetch_refused"),
    ],
)
def test_an_endpoint_that_is_no_hub(hub, root, endpoint, code):
    error = failure(hub, root, endpoint=endpoint)
    assert (error.code, error.exit_status) == (code, 69)
    assert "HF_ENDPOINT" in error.message


@pytest.mark.parametrize("status", [400, 418, 451])
def test_a_status_that_stays_is_not_tried_again(hub, root, status):
    hub.statuses = [status] * TRIES
    error = failure(hub, root)
    assert error.code == "fetch_refused" and str(status) in error.message
    assert len(hub.requests) == 1


# ------------------------------------------------------------------ the folder


def test_a_wrong_file_in_its_place_is_left_alone(hub, root):
    target = root / ENTRY.path
    target.parent.mkdir(parents=True)
    for wrong in (b"short", bytes(len(DATA))):
        target.write_bytes(wrong)
        error = failure(hub, root)
        assert (error.code, error.exit_status) == ("fetch_exists", 74)
        assert str(target) in error.message and "move it away" in error.message
        assert target.read_bytes() == wrong
    target.unlink()
    target.mkdir()
    assert failure(hub, root).code == "fetch_exists"
    assert hub.requests == []


@pytest.fixture
def no_links(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_a_file_that_appears_meanwhile_is_left_alone(hub, root):
    target = root / ENTRY.path
    target.parent.mkdir(parents=True)
    error = failure(hub, root, progress=Recorder(lambda done: target.write_bytes(b"the user's")))
    assert error.code == "fetch_exists" and target.read_bytes() == b"the user's"
    assert partial(root).read_bytes() == DATA


def test_the_same_without_hard_links(hub, root, no_links):
    test_a_file_that_appears_meanwhile_is_left_alone(hub, root)


def test_a_file_system_without_hard_links(hub, root, no_links):
    assert fetched(hub, root).read_bytes() == DATA
    assert files(root) == ["ckpts/model/model.pth"]


def test_no_room_is_seen_before_a_byte_is_downloaded(hub, root):
    hub.announce = 1 << 60
    error = failure(hub, root, replace(ENTRY, size=1 << 60))
    assert (error.code, error.exit_status) == ("fetch_no_room", 74)
    assert "1.2 EB" in error.message and str(root) in error.message
    assert hub.bodies() == [] and files(root) == []


def test_a_volume_that_runs_full_keeps_what_came(hub, root, monkeypatch):
    monkeypatch.setattr(module, "KEEP", -KEEP)
    with mounted(root, "size=2m"):
        error = failure(hub, root)
        assert (error.code, error.exit_status) == ("fetch_no_room", 74)
        assert "No space left" in error.message
        kept = partial(root).stat().st_size
        assert 0 < kept <= 2 << 20 and not (root / ENTRY.path).exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(root)], check=True)
        assert fetched(hub, root).read_bytes() == DATA
        assert hub.bodies()[-1].begin == kept


def test_a_read_only_volume(hub, root):
    with mounted(root, "ro"):
        error = failure(hub, root)
    assert (error.code, error.exit_status) == ("fetch_write_failed", 74)
    assert "Read-only file system" in error.message and "SEEDPOD_ROOTS" in error.message


def test_a_root_that_is_not_mounted_is_not_made(hub, root):
    error = failure(hub, root / "workspace")
    assert error.code == "fetch_root_missing" and not (root / "workspace").exists()


def test_a_link_out_of_the_root_is_not_followed(hub, root, tmp_path):
    (tmp_path / "outside").mkdir()
    (root / "ckpts").symlink_to(tmp_path / "outside")
    error = failure(hub, root)
    assert (error.code, error.exit_status) == ("fetch_outside", 74)
    assert list((tmp_path / "outside").iterdir()) == []


def test_fetching_needs_no_torch():
    code = "import sys, app.boot.fetch; assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parents[2], check=True)
