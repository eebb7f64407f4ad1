"""Staging on a fake machine: real files, real processes, faked facts of the kernel."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import app.boot.stage as module
from app.boot.copies import Copy
from app.boot.copy import BLOCK
from app.boot.places import Places
from app.boot.stage import stage, unstage
from app.errors import SeedpodError
from tests.boot.places import GIB, Machine, Recorder, mounted, sha256

SIZE = 6 * BLOCK + 4321
PROJECT = Path(module.__file__).parents[2]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def staged(
    machine, source, *, mode="auto", hash="right", progress=None, places: Places | None = None, cancel=None
):
    return stage(
        source,
        sha256=sha256(source) if hash == "right" else hash,
        mode=mode,
        readers=4,
        progress=progress or Recorder(),
        places=places or machine.places(),
        cancel=cancel,
    )


def failure(*args, **kwargs) -> SeedpodError:
    with pytest.raises(SeedpodError) as caught:
        staged(*args, **kwargs)
    return caught.value


# ------------------------------------------------------------------ copying


def test_staged_equals_direct_and_says_what_was_done(machine):
    source, progress = machine.file(SIZE), Recorder()
    copy = staged(machine, source, progress=progress)
    assert copy.staged and copy.path.is_relative_to(machine.shm)
    assert copy.path.read_bytes() == source.read_bytes()
    assert (copy.sha256, copy.nbytes, copy.source) == (sha256(source), SIZE, source)
    assert copy.seconds > 0 and copy.gigabytes_per_second > 0
    assert copy.path.name == f"{sha256(source)}-model.pth"
    assert copy.path.parent.stat().st_mode & 0o777 == 0o700
    assert machine.left() == [f".{copy.path.name}.json", copy.path.name]
    assert (progress.done, progress.total) == (SIZE, SIZE)
    assert "nfs4 at" in progress.notes[0] and "GB/s" in progress.notes[0]


def test_an_empty_file_is_staged(machine):
    copy = staged(machine, machine.file(0))
    assert copy.staged and copy.path.read_bytes() == b""


def test_already_staged_is_taken_without_reading_the_source(machine, monkeypatch):
    source = machine.file(SIZE)
    first = staged(machine, source)
    monkeypatch.setattr(module, "copy_and_hash", lambda *args, **kwargs: pytest.fail("copied again"))
    second = staged(machine, source, hash=first.sha256)
    assert (second.path, second.sha256, second.nbytes) == (first.path, first.sha256, 0)
    assert "staged already" in second.reason


def test_a_copy_in_tmp_is_taken_when_shm_has_room_again(machine):
    source = machine.file(SIZE)
    first = staged(machine, source, mode="tmp")
    assert first.path.is_relative_to(machine.tmp)
    assert staged(machine, source, mode="auto").path == first.path
    assert staged(machine, source, mode="shm").path.is_relative_to(machine.shm)


def test_without_a_known_hash_a_changed_source_gets_a_copy_of_its_own(machine):
    source = machine.file(SIZE, seed=1)
    first = staged(machine, source, hash=None)
    assert first.sha256 == sha256(source)
    assert staged(machine, source, hash=None).nbytes == 0
    source.write_bytes(random.Random(2).randbytes(SIZE))
    second = staged(machine, source, hash=None)
    assert second.path != first.path
    assert second.path.read_bytes() == source.read_bytes()


def test_a_link_is_followed_and_keeps_its_own_name(machine):
    blob = machine.file(SIZE, "0a1b2c")
    link = machine.volume / "model.safetensors"
    link.symlink_to(blob)
    copy = staged(machine, link)
    assert copy.path.name.endswith("-model.safetensors")
    assert not copy.path.is_symlink() and copy.path.read_bytes() == blob.read_bytes()


@pytest.mark.parametrize(
    "harm", ["shorter", "longer", "rewritten", "no record", "broken record", "a link", "reboot"]
)
def test_a_copy_that_is_not_as_it_was_made_is_made_again(machine, harm):
    source = machine.file(SIZE)
    path = staged(machine, source).path
    path.chmod(0o600)
    record = Copy(path, "").record
    if harm == "shorter":
        os.truncate(path, SIZE - 1)
    elif harm == "longer":
        path.write_bytes(source.read_bytes() + b"x")
    elif harm == "rewritten":
        path.write_bytes(bytes(SIZE))
    elif harm == "no record":
        record.unlink()
    elif harm == "broken record":
        record.write_text("[" * 100)
    elif harm == "a link":
        path.rename(path.with_name("other"))
        path.symlink_to("other")
    else:
        machine.write("proc/sys/kernel/random/boot_id", "boot-2\n")
    again = staged(machine, source)
    assert again.nbytes == SIZE, f"{harm} was taken for whole"
    assert again.path.read_bytes() == source.read_bytes()


def test_unstage_removes_the_copy_and_never_the_source(machine):
    source = machine.file(SIZE)
    copy = staged(machine, source)
    unstage(copy)
    assert machine.left() == []
    unstage(copy)
    unstage(staged(machine, source, mode="off"))
    assert source.stat().st_size == SIZE


# ------------------------------------------------------------------ deciding


@pytest.mark.parametrize("kind", ["ext4", "xfs", "overlay", "tmpfs"])
def test_auto_leaves_a_local_file_in_place(tmp_path, kind):
    machine = Machine(tmp_path, volume=kind)
    source, progress = machine.file(SIZE), Recorder()
    found = staged(machine, source, progress=progress)
    assert (found.path, found.staged, found.sha256) == (source, False, None)
    assert found.reason == f"in place: it is local already ({kind} at {machine.volume})"
    assert progress.notes == [found.reason]
    assert machine.left() == []


@pytest.mark.parametrize("mode", ["shm", "tmp"])
def test_a_forced_place_is_used_for_a_local_file_too(tmp_path, mode):
    machine = Machine(tmp_path, volume="ext4")
    copy = staged(machine, machine.file(SIZE), mode=mode)
    assert copy.staged and copy.path.is_relative_to(machine.root / mode)


@pytest.mark.parametrize("mode", ["auto", "shm"])
def test_a_file_in_the_place_itself_is_not_copied(machine, mode):
    source = machine.shm / "model.pth"
    source.write_bytes(b"x" * 100)
    found = staged(machine, source, mode=mode)
    assert found.path == source and "already" in found.reason


def test_off_never_copies(machine):
    found = staged(machine, machine.file(SIZE), mode="off")
    assert not found.staged and found.reason == "in place: staging is off" and machine.left() == []


def too_large(machine):
    source = machine.volume / "huge.pth"
    source.touch()
    os.truncate(source, 8 << 40)  # sparse: no disk of a test machine has that room, and none is used
    return source


def test_no_room_anywhere_leaves_the_file_in_place_and_says_why(machine):
    source = too_large(machine)
    found = staged(machine, source, hash="0" * 64)
    assert found.path == source
    assert f"{machine.shm}: " in found.reason and f"{machine.tmp}: the folder leaves" in found.reason


@pytest.mark.parametrize("mode", ["shm", "tmp"])
def test_no_room_in_a_forced_place_is_an_error_with_numbers(machine, mode):
    error = failure(machine, too_large(machine), mode=mode, hash="0" * 64)
    assert (error.code, error.exit_status) == ("stage_no_room", 74)
    assert (
        "8.8 TB" in error.message and "leaves" in error.message and f"SEEDPOD_STAGE={mode}" in error.message
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_limit_that_is_too_small_sends_the_file_to_tmp(machine, version):
    source = machine.file(SIZE)
    limit = machine.limit_v1 if version == 1 else machine.limit_v2
    limit(GIB, GIB - SIZE + 1)
    assert staged(machine, source).path.is_relative_to(machine.tmp)
    error = failure(machine, source, mode="shm")
    assert error.code == "stage_no_room" and "the container's memory limit leaves" in error.message
    limit(GIB, GIB - SIZE)
    assert staged(machine, source, mode="shm").path.is_relative_to(machine.shm)


def test_a_really_full_shm_sends_the_file_to_tmp(machine):
    source = machine.file(SIZE)
    with mounted(machine.shm, "size=8m"):
        assert staged(machine, source).path.is_relative_to(machine.tmp)


def test_room_that_runs_out_while_copying_sends_the_file_to_tmp(machine):
    source, progress = machine.file(SIZE), Recorder()
    with mounted(machine.shm, "size=8m"):
        places = machine.places(keep=-10.0)  # believes there is more room than there is
        copy = staged(machine, source, places=places, progress=progress)
        assert copy.path.is_relative_to(machine.tmp)
        assert copy.path.read_bytes() == source.read_bytes()
        assert progress.done == SIZE
        assert not [path for path in machine.shm.rglob("*") if not path.is_dir()]
        assert failure(machine, source, mode="shm", places=places).code == "stage_no_room"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "stage_no_room"), (errno.EDQUOT, "stage_no_room"), (errno.EIO, "stage_write_failed")],
)
def test_a_write_that_fails_is_cleaned_up(machine, monkeypatch, number, code):
    source, write, writes = machine.file(SIZE), os.pwrite, []

    def failing(*args):
        writes.append(args)
        if len(writes) == 4:
            raise OSError(number, os.strerror(number))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    error = failure(machine, source, mode="shm")
    assert error.code == code and os.strerror(number) in error.message
    assert machine.left() == []
    writes.clear()
    assert staged(machine, source).path.is_relative_to(machine.tmp)


def test_a_read_only_folder_is_skipped_with_the_reason(machine):
    source = machine.file(SIZE)
    with mounted(machine.shm, "ro"):
        copy = staged(machine, source)
        assert copy.path.is_relative_to(machine.tmp)
        error = failure(machine, source, mode="shm")
        assert error.code == "stage_write_failed" and "Read-only file system" in error.message


def test_a_place_that_does_not_exist_is_skipped(machine):
    machine.shm.rmdir()
    assert staged(machine, machine.file(SIZE)).path.is_relative_to(machine.tmp)


def plant_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def plant_foreign(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("giving a folder away needs root")
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


def plant_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


@pytest.mark.parametrize("plant", [plant_link, plant_foreign, plant_open, Path.touch])
def test_a_folder_that_others_could_write_to_is_refused(machine, plant):
    source = machine.file(SIZE)
    folder = machine.shm / f"seedpod-{os.geteuid()}"
    plant(folder)
    if folder.is_dir():  # a copy that only looks finished
        planted = Copy(folder / f"{sha256(source)}-model.pth", "boot-1")
        planted.partial.write_bytes(bytes(SIZE))
        planted.finish(sha256(source))
    assert staged(machine, source).path.is_relative_to(machine.tmp)
    error = failure(machine, source, mode="shm")
    assert error.code == "stage_folder_unsafe" and str(folder) in error.message


# ------------------------------------------------------------------ sources that are wrong


def test_a_wrong_hash_names_both_and_leaves_nothing(machine):
    source = machine.file(SIZE)
    before = source.stat()
    error = failure(machine, source, hash="ab" * 32)
    assert (error.code, error.exit_status) == ("stage_hash_mismatch", 78)
    assert "ab" * 32 in error.message and sha256(source) in error.message and str(source) in error.message
    assert machine.left() == []
    assert source.stat().st_mtime_ns == before.st_mtime_ns


def append(source: Path) -> None:
    with source.open("ab") as file:
        file.write(b"more")


def rewrite(source: Path) -> None:
    with source.open("r+b") as file:
        file.seek(SIZE - 10)
        file.write(b"other")


def replace(source: Path) -> None:
    other = source.with_suffix(".new")
    other.write_bytes(bytes(SIZE))
    other.rename(source)


@pytest.mark.parametrize(
    "change", [append, rewrite, replace, Path.unlink, lambda path: os.truncate(path, BLOCK)]
)
@pytest.mark.parametrize("known", ["right", None])
def test_a_source_that_changes_while_it_is_copied(machine, change, known):
    source = machine.file(SIZE)
    progress = Recorder()
    progress.on_block = lambda done: change(source) if progress.blocks == 2 else None
    error = failure(machine, source, hash=known, progress=progress)
    assert (error.code, error.exit_status) == ("stage_source_changed", 74)
    assert str(source) in error.message and machine.left() == []
    assert progress.notes == ["failed (stage_source_changed)"]


@pytest.mark.parametrize("kind", ["missing", "folder", "fails"])
def test_a_source_that_cannot_be_read(machine, monkeypatch, kind):
    source = machine.volume / "model.pth"
    if kind == "folder":
        source.mkdir()
    elif kind == "fails":
        machine.file(SIZE)

        def failing(*args):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
    error = failure(machine, source, hash=None)
    assert (error.code, error.exit_status) == ("stage_source_unreadable", 74)
    assert str(source) in error.message and machine.left() == []


# ------------------------------------------------------------------ threads and processes


def test_cancel_leaves_nothing(machine):
    source, cancel = machine.file(SIZE), threading.Event()
    progress = Recorder(lambda done: cancel.set() if done >= 2 * BLOCK else None)
    error = failure(machine, source, progress=progress, cancel=cancel)
    assert (error.code, error.exit_status) == ("stage_cancelled", 69)
    assert machine.left() == []


def test_files_are_staged_in_threads_beside_each_other(machine):
    sources = [machine.file(SIZE + n, f"{n}.pth", seed=n) for n in range(4)]
    results = {}
    threads = [
        threading.Thread(target=lambda s=s: results.update({s: staged(machine, s, hash=sha256(s))}))
        for s in [*sources, sources[0]]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for source in sources:
        assert results[source].path.read_bytes() == source.read_bytes()
    assert len(machine.left()) == 2 * len(sources)


CHILD = """
import os, signal, sys, time
from pathlib import Path
from app.boot.copies import Copy
from app.boot.stage import stage
from tests.boot.places import Machine, Recorder

root, source, sha256, then, block = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
machine = Machine.__new__(Machine)
machine.root, machine.proc, machine.cgroup = root, root / "proc", root / "cgroup"
machine.shm, machine.tmp = root / "shm", root / "tmp"

def stop():
    print("there", flush=True)
    if then == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "hang":
        time.sleep(60)
    if then == "linger":
        time.sleep(0.3)

progress = Recorder()
progress.on_block = lambda done: stop() if progress.blocks == block else None
rename = Path.rename
if block == 98:
    Path.rename = lambda *args: (stop(), rename(*args))[1]
if block == 99:
    Path.rename = lambda *args: (rename(*args), stop())[0]
found = stage(source, sha256=sha256, mode="shm", readers=4, progress=progress, places=machine.places())
print(found.nbytes, found.path, flush=True)
"""


def child(machine, source, then: str = "go on", block: int = 0) -> subprocess.Popen:
    """A process that stages `source` and, at a block (98: before the rename, 99: after it), does `then`."""
    arguments = [str(machine.root), str(source), sha256(source), then, str(block)]
    command = [sys.executable, "-c", CHILD, *arguments]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_nothing_half_written_is_ever_taken_for_whole(machine):
    """Killed at any point, the next run gives the source's bytes, and clears up what was left."""
    source = machine.file(SIZE)
    blocks = [*random.Random(7).sample(range(1, 8), 4), 98, 99]
    for n, block in enumerate(blocks):
        with child(machine, source, "kill", block) as process:
            assert process.wait(30) == -signal.SIGKILL, "it was to be killed in the middle"
        assert any(name.endswith(".lock") for name in machine.left())
        again = staged(machine, source, mode="shm")
        assert again.nbytes == (0 if block == 99 else SIZE), block
        assert again.path.read_bytes() == source.read_bytes()
        left = machine.left()
        assert [name for name in left if name.endswith(".partial")] == []
        unstage(again)
        source = machine.file(SIZE, seed=n + 10)


def test_what_a_dead_process_left_of_another_file_is_cleared_up(machine):
    source = machine.file(SIZE)
    with child(machine, source, "kill", 3) as process:
        process.wait(30)
    assert any(name.endswith(".partial") for name in machine.left())
    other = staged(machine, machine.file(100, "other.pth"), mode="shm")
    assert machine.left() == [f".{other.path.name}.json", other.path.name]


def test_of_several_processes_at_once_exactly_one_copies(machine):
    source = machine.file(SIZE)
    processes = [child(machine, source, "linger", 3) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(int(words[-2]) for words in said) == [0, 0, SIZE]
    assert {words[-1] for words in said} == {str(staged(machine, source).path)}


def test_a_holder_that_dies_is_taken_over_from(machine):
    source, found = machine.file(SIZE), []
    with child(machine, source, "hang", 3) as process:
        assert process.stdout.readline() == "there\n"
        thread = threading.Thread(target=lambda: found.append(staged(machine, source, mode="shm")))
        thread.start()
        time.sleep(0.3)
        assert found == []  # it waits, and leaves the other's partial copy alone
        assert any(name.endswith(".partial") for name in machine.left())
        process.kill()
        thread.join(30)
    assert found[0].nbytes == SIZE and found[0].path.read_bytes() == source.read_bytes()


def test_waiting_for_another_process_can_be_cancelled(machine):
    source, cancel = machine.file(SIZE), threading.Event()
    with child(machine, source, "hang", 3) as process:
        process.stdout.readline()
        threading.Timer(0.2, cancel.set).start()
        assert failure(machine, source, mode="shm", cancel=cancel).code == "stage_cancelled"
        assert any(name.endswith(".partial") for name in machine.left())
        process.kill()
