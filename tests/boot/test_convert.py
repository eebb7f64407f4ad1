"""The 16-bit file equals torch's own cast, is all there or not at all, and is never made twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from app import __version__
from app.boot import convert as convert_module
from app.boot.convert import convert
from app.boot.partial import locked_part, part_of
from app.boot.tensorfile import read_index
from app.errors import ConfigError, FileError, SeedpodError, UnavailableError, UsageError
from app.progress import Lines

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
Dtype = Literal["bf16", "fp16"]


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    wide = torch.randn(40, 30)
    return {
        "mask": torch.tensor([True, False, True]),
        "odd": torch.randn(7),
        "proj.weight": wide,
        "proj.turned": wide.t(),
        "proj.row": wide[3],
        "rope.freqs": torch.linspace(1, 128, 11),
        "double": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(5).bfloat16(),
        "steps": torch.tensor([1 << 40]),
        "empty": torch.zeros(0, 4),
    }


def saved(folder: Path, tensors: Any | None = None, name: str = "seedvr2_ema_3b.pth", **options: Any) -> Path:
    torch.save(state() if tensors is None else tensors, folder / name, **options)
    return folder / name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_cast(target: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    found = load_file(target)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        kept = not tensor.is_floating_point() or name.endswith(".freqs")
        want = tensor if kept else tensor.to(dtype)
        assert found[name].dtype == want.dtype, name
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_result_is_torchs_own_cast(tmp_path: Path, dtype: Dtype, zipped: bool) -> None:
    source = saved(tmp_path, _use_new_zipfile_serialization=zipped)
    target = convert(source, "torch", dtype=dtype, source_sha256=sha256(source))
    assert target == tmp_path / f"seedvr2_ema_3b.{dtype}.safetensors"
    assert_cast(target, state(), DTYPES[dtype])
    assert list(read_index(target, "safetensors").tensors) != []


@pytest.mark.parametrize("known", [True, False])
def test_metadata_and_hashes_say_what_it_is(tmp_path: Path, known: bool) -> None:
    source = saved(tmp_path)
    target = convert(source, "torch", dtype="bf16", source_sha256=sha256(source) if known else None)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "source_sha256": sha256(source),
            "source_size": str(source.stat().st_size),
            "dtype": "bf16",
            "producer": f"seedpod {__version__}",
        }
    assert target.with_name(f"{target.name}.sha256").read_text() == f"{sha256(target)}  {target.name}\n"
    run = subprocess.run(["sha256sum", "-c", f"{target.name}.sha256"], cwd=tmp_path, capture_output=True)
    assert run.returncode == 0, run.stdout
    assert files(tmp_path) == [f"{target.name}", f"{target.name}.sha256", source.name]


def test_the_same_master_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        source = saved(folder)
        convert(source, "torch", source_sha256=sha256(source) if folder.name == "a" else None)
    assert sha256(folders[0] / "seedvr2_ema_3b.bf16.safetensors") == sha256(
        folders[1] / "seedvr2_ema_3b.bf16.safetensors"
    )


def test_a_safetensors_master_a_section_and_another_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.float16)}, tmp_path / "m.safetensors")
    (tmp_path / "out").mkdir()
    target = convert(tmp_path / "m.safetensors", "safetensors", folder=tmp_path / "out")
    assert target == tmp_path / "out" / "m.bf16.safetensors"
    assert_cast(target, {"a": torch.ones(3), "b": torch.zeros(2)}, torch.bfloat16)
    source = saved(tmp_path, {"generator": {"a": torch.zeros(2)}, "generator_ema": {"a": torch.ones(2)}})
    target = convert(source, "torch", section="generator_ema")
    assert_cast(target, {"a": torch.ones(2)}, torch.bfloat16)
    assert read_index(target, "safetensors").metadata["section"] == "generator_ema"
    with pytest.raises(ConfigError, match=r"in sections \(generator, generator_ema\)"):
        convert(source, "torch")


KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
SHAPES = st.lists(st.integers(0, 6), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, KINDS), max_size=6), st.booleans())
def test_any_state_converts(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, Any], zipped: bool
) -> None:
    shapes.pop("__metadata__", None)
    tensors = {name: (torch.rand(shape) * 9).to(kind) for name, (shape, kind) in shapes.items()}
    tensors["at least one"] = torch.rand(3)
    source = saved(tmp_path_factory.mktemp("any"), tensors, _use_new_zipfile_serialization=zipped)
    target = convert(source, "torch", source_sha256=sha256(source))  # the hash holds: every byte is read once
    assert_cast(target, tensors, torch.bfloat16)


def test_it_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path)
    target = convert(source, "torch", source_sha256=sha256(source))
    before = target.stat()
    for known in (sha256(source), None):
        convert(source, "torch", source_sha256=known, progress=Lines())
        assert "already made from this master" in capsys.readouterr().err
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    source = saved(tmp_path, state(seed=1))  # a newer master under the same name
    convert(source, "torch")
    assert_cast(target, state(seed=1), torch.bfloat16)
    assert target.with_name(f"{target.name}.sha256").read_text().startswith(sha256(target))


@pytest.mark.parametrize("sidecar", [None, "", "nonsense\n"])
def test_a_hash_lost_in_a_crash_is_made_up_for(tmp_path: Path, sidecar: str | None) -> None:
    source = saved(tmp_path)
    target = convert(source, "torch")
    beside = target.with_name(f"{target.name}.sha256")
    beside.unlink()
    if sidecar is not None:
        beside.write_text(sidecar)
    inode = target.stat().st_ino
    convert(source, "torch")
    assert beside.read_text() == f"{sha256(target)}  {target.name}\n"
    assert target.stat().st_ino == inode


def test_a_crash_before_the_hash_leaves_none_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert(saved(tmp_path), "torch")
    source = saved(tmp_path, state(seed=1))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "_write_sidecar", crash)
    with pytest.raises(KeyboardInterrupt):
        convert(source, "torch")
    assert_cast(target, state(seed=1), torch.bfloat16)
    assert files(tmp_path) == [target.name, source.name]


def refused(error: type[SeedpodError], code: str, source: Path, **options: Any) -> str:
    """The message of a conversion that fails and leaves the folder as it was."""
    before = files(source.parent)
    with pytest.raises(error) as caught:
        convert(source, "torch", **options)
    assert caught.value.code == code, caught.value.message
    assert files(source.parent) == before
    return caught.value.message


def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path)
    message = refused(ConfigError, "checkpoint_hash", source, source_sha256="ab" * 32)
    assert sha256(source) in message
    large = saved(tmp_path, {"small": torch.ones(9), "proj.bias": torch.tensor([1.0, -7e4])}, "large.pth")
    message = refused(ConfigError, "checkpoint_overflow", large, dtype="fp16")
    assert message.startswith("tensor proj.bias holds 7e+04, which is beyond float16 (up to 6.55e+04)")
    turned = saved(tmp_path, {"proj": torch.full((3, 4), 7e4).t()}, "turned.pth")
    refused(ConfigError, "checkpoint_overflow", turned, dtype="fp16")
    half = saved(tmp_path, {"a": torch.ones(3).bfloat16(), "rope.freqs": torch.ones(3)}, "half.pth")
    refused(UsageError, "convert_needless", half)
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "5,000 bytes free, expected " in refused(FileError, "no_space", source)


def test_a_file_of_another_maker_is_left_alone(tmp_path: Path) -> None:
    source = saved(tmp_path)
    target = tmp_path / "seedvr2_ema_3b.bf16.safetensors"
    save_file({"a": torch.ones(1)}, target)
    assert "its producer is 'not named'" in refused(FileError, "convert_target_exists", source)
    target.write_bytes(b"something else entirely")
    assert "is in the way" in refused(FileError, "convert_target_exists", source)
    assert target.read_bytes() == b"something else entirely"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = saved(tmp_path)
    message = refused(FileError, "folder_not_writable", source, folder=tmp_path / "none")
    assert "Mount the volume writable, or name another root" in message


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source = saved(tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((FileError, KeyboardInterrupt), match=r"^$|was not written: No space left on device"):
        convert(source, "torch")
    assert files(tmp_path) == [source.name]


SLOW = """
import os, sys, time
from pathlib import Path
from app.boot.convert import convert
write = os.write
def slowly(descriptor, data):
    count = write(descriptor, data[:1000])
    print("writing", flush=True)
    time.sleep(0.2)
    return count
os.write = slowly
convert(Path(sys.argv[1]), "torch")
"""


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    source = saved(tmp_path)
    target = tmp_path / "seedvr2_ema_3b.bf16.safetensors"
    with subprocess.Popen([sys.executable, "-c", SLOW, source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(UnavailableError, match="is being written by another process") as caught:
            convert(source, "torch")
        assert caught.value.code == "convert_running"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert files(tmp_path) == [f".{target.name}.lock", part_of(target).name, source.name]
    convert(source, "torch")
    assert_cast(target, state(), torch.bfloat16)
    assert files(tmp_path) == [target.name, f"{target.name}.sha256", source.name]


def test_two_writers_never_hold_one_file(tmp_path: Path) -> None:
    """Also while files are renamed and removed below them."""
    target = tmp_path / "a"
    holding = threading.Semaphore(1)
    held, clashes = [], []

    def write(number: int) -> None:
        for _ in range(200):
            try:
                with locked_part(target) as part:
                    alone = holding.acquire(blocking=False)
                    os.write(part, b"%d" % number)
                    (held if alone else clashes).append(number)
                    if len(held) % 2:
                        part_of(target).replace(target)
                    holding.release()
            except UnavailableError:
                pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert len(held) > 1
    assert files(tmp_path) == ["a"]


MEASURE = """
import json, sys, torch
from pathlib import Path
from app.boot.convert import convert

def peak():  # not getrusage: a child begins with its parent's maximum
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.ones(1 << 16).to(torch.bfloat16).sum()
before = peak()
peaks = []
for path, sha256 in zip(sys.argv[1::2], sys.argv[2::2]):
    convert(Path(path), "torch", source_sha256=sha256)
    peaks.append(peak() - before)
print(json.dumps(peaks))
"""


def test_peak_memory_is_a_few_blocks_whatever_the_size(tmp_path: Path) -> None:
    words = []
    for count in (2, 8):
        tensors = {f"{i}.weight": torch.ones(2048, 2048) for i in range(count)}
        source = saved(tmp_path, tensors, f"{count}.pth")
        words += [str(source), sha256(source)]
    run = [sys.executable, "-c", MEASURE, *words]
    small, large = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    written = (tmp_path / "8.bf16.safetensors").stat().st_size
    print(f"{small / 1e6:.0f} MB of memory for a quarter, {large / 1e6:.0f} MB for {written / 1e6:.0f} MB")
    assert small > 8e6, "what was measured is the conversion"
    assert large < small + 10e6
    assert large < 0.5 * written


@pytest.mark.parametrize("suffix", ["", ".sha256"])
def test_a_planted_link_is_never_written_through(tmp_path: Path, suffix: str) -> None:
    source = saved(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = f"seedvr2_ema_3b.bf16.safetensors{suffix}"
    (tmp_path / f".{name}.part").symlink_to(victim)
    assert_cast(convert(source, "torch"), state(), torch.bfloat16)
    assert victim.read_text() == "mine"
    assert not (tmp_path / name).is_symlink()


def test_a_pipe_in_place_of_the_master_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.pth")
    with pytest.raises(FileError, match="not a file"):
        convert(tmp_path / "m.pth", "torch")


def test_a_pipe_in_place_of_the_hash_is_replaced(tmp_path: Path) -> None:
    source = saved(tmp_path)
    target = convert(source, "torch")
    sidecar = target.with_name(f"{target.name}.sha256")
    sidecar.unlink()
    os.mkfifo(sidecar)
    convert(source, "torch")
    assert sidecar.read_text().split() == [sha256(target), target.name]


def test_a_master_copied_anew_does_not_leave_its_conversion_the_older_one(tmp_path: Path) -> None:
    source = saved(tmp_path)
    target = convert(source, "torch")
    os.utime(target, ns=(0, 1))
    convert(source, "torch")
    assert target.stat().st_mtime_ns >= source.stat().st_mtime_ns
