"""The index agrees with torch and safetensors on good files, and says what a bad one is."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from app.boot.tensorfile import TensorIndex, compare_tensors, read_index, rename_tensors
from app.boot.tensorread import DTYPES
from app.errors import ConfigError, FileError

STATE = {
    "proj.weight": torch.arange(12.0).reshape(3, 4),
    "proj.bias": torch.ones(5, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}


def save(value: Any, path: Path, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def values(index: TensorIndex) -> dict[str, torch.Tensor]:
    """Each tensor of an index, made from the bytes that its entry points at."""
    data = index.path.read_bytes()
    tensors = {}
    for name, entry in index.tensors.items():
        part = bytearray(data[entry.offset : entry.offset + entry.span])
        flat = torch.empty(0, dtype=DTYPES[entry.dtype])
        flat = torch.frombuffer(part, dtype=flat.dtype) if part else flat
        strides = entry.strides or torch.empty(entry.shape).stride()
        tensors[name] = flat.as_strided(entry.shape, strides)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_is_indexed_as_torch_loads_it(tmp_path: Path, zipped: bool) -> None:
    path = save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(values(read_index(path, "torch")), torch.load(path, weights_only=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_storage(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": whole,
        "turned": whole.t(),
        "part": whole[1:3, ::2],
        "row": whole[2],
        "one": whole[1:2, 3:4],
    }
    path = save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    index = read_index(path, "torch")
    assert_same(values(index), state)
    assert {name for name, entry in index.tensors.items() if entry.strides} == {"turned", "part"}
    assert index.tensors["part"].nbytes == 2 * 3 * 4
    assert index.tensors["part"].span == (6 + 4 + 1) * 4
    assert path.stat().st_size < 2 * 24 * 4 + 3000, "the storage is kept once"


def test_a_module_state_with_parameters_and_metadata(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = OrderedDict(module.state_dict(keep_vars=True))
    path = save(state, tmp_path / "a.ckpt")
    assert_same(values(read_index(path, "torch")), {name: t.detach() for name, t in state.items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_tensor_has_the_empty_name(tmp_path: Path, zipped: bool) -> None:
    tensor = torch.randn(58, 16).bfloat16()
    path = save(tensor, tmp_path / "pos_emb.pt", _use_new_zipfile_serialization=zipped)
    assert_same(values(read_index(path, "torch")), {"": tensor})


def test_sections_are_named_and_chosen(tmp_path: Path) -> None:
    state = {
        "generator": {"a": torch.ones(2)},
        "generator_ema": {"a": torch.zeros(2)},
        "step": 3,
        "x": {"y": 1},
    }
    path = save(state, tmp_path / "a.pt")
    top = read_index(path, "torch")
    assert (dict(top.tensors), top.sections) == ({}, ("generator", "generator_ema"))
    assert_same(values(read_index(path, "torch", section="generator_ema")), state["generator_ema"])
    with pytest.raises(
        ConfigError, match="no section 'ema' of tensors; it has generator, generator_ema"
    ) as caught:
        read_index(path, "torch", section="ema")
    assert caught.value.code == "checkpoint_section"


def test_other_pickle_protocols_and_dtypes(tmp_path: Path) -> None:
    state = {
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "u16": torch.arange(3).to(torch.uint16),
        "name": b"raw",
    }
    for protocol in (2, 3, 4, 5):
        path = save(state, tmp_path / f"{protocol}.pth", pickle_protocol=protocol)
        index = read_index(path, "torch")
        assert {name: entry.dtype for name, entry in index.tensors.items()} == {"f8": "F8_E4M3", "u16": "U16"}


def test_an_unaligned_archive_is_read_header_by_header(tmp_path: Path) -> None:
    """A state dict that somebody unpacked and packed again without compression is still right."""
    original = save(STATE, tmp_path / "a.pth")
    path = tmp_path / "b.pth"
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    assert_same(values(read_index(path, "torch")), STATE)
    assert_same(torch.load(path, weights_only=True), STATE)


def test_safetensors_is_indexed_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    index = read_index(path, "safetensors")
    found = values(index)
    assert_same({name: found[name] for name in STATE}, STATE)
    assert index.metadata == {"format": "pt"}


SHAPES = st.lists(st.integers(0, 4), max_size=3)
KINDS = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
STATES = st.dictionaries(st.text(min_size=1, max_size=12), st.tuples(SHAPES, KINDS), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(STATES, st.booleans())
def test_any_state_round_trips(tmp_path_factory: pytest.TempPathFactory, shapes: Any, zipped: bool) -> None:
    folder = tmp_path_factory.mktemp("state")
    state = {name: (torch.rand(shape) * 200).to(kind) for name, (shape, kind) in shapes.items()}
    path = save(state, folder / "a.pth", _use_new_zipfile_serialization=zipped)
    assert_same(values(read_index(path, "torch")), torch.load(path, weights_only=True))
    state.pop("__metadata__", None)
    if state:
        save_file(state, folder / "a.safetensors")
        found = values(read_index(folder / "a.safetensors", "safetensors"))
        assert_same({name: found[name] for name in state}, state)


def test_an_index_takes_a_few_small_reads_and_no_torch(tmp_path: Path) -> None:
    """The 7B has 1,128 tensors in 33 GB: neither the tensors nor their headers may be visited."""
    state = {f"blocks.{i}.weight": torch.zeros(2048) for i in range(1128)}
    path = save(state, tmp_path / "big.pth")
    code = (
        "import sys, io, time, pathlib\n"
        "from app.boot.tensorfile import read_index\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "reads = []\n"
        "class Counted(io.FileIO):\n"
        "    def readinto(self, buffer):\n"
        "        count = super().readinto(buffer); reads.append(count); return count\n"
        "    def readall(self):\n"
        "        data = super().readall(); reads.append(len(data)); return data\n"
        "    def read(self, size=-1):\n"
        "        data = super().read(size); reads.append(len(data)); return data\n"
        "pathlib.Path.open = lambda self, mode: io.BufferedReader(Counted(self))\n"
        "index = read_index(path, 'torch')\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'\n"
        "print(len(index.tensors), len(reads), sum(reads))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    tensors, reads, read = map(int, run.stdout.split())
    print(f"{tensors} tensors of a {path.stat().st_size:,} byte file from {reads} reads of {read:,} bytes")
    assert tensors == 1128
    assert reads < 60
    assert read < path.stat().st_size / 8
    began = time.perf_counter()
    read_index(path, "torch")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_unreadable_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "none.pth"
    with pytest.raises(FileError) as caught:
        read_index(path, "torch")
    assert caught.value.code == "file_unreadable"
    assert str(path) in caught.value.message


# ------------------------------------------------------------------ comparing with a model


def indexed(tmp_path: Path, **shapes: tuple[int, ...]) -> TensorIndex:
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(state, tmp_path / "a.safetensors")
    return read_index(tmp_path / "a.safetensors", "safetensors")


def test_compare_says_what_is_missing_left_over_and_misshapen(tmp_path: Path) -> None:
    index = indexed(tmp_path, a=(2, 3), b=(4,), extra=(1,), positive_conditioning=(2,))
    expected = {"a": (2, 3), "b": (5,), "c": (), "d": (1,), "e": (1,), "f": (1,)}
    sentences = compare_tensors(expected, index, dropped=("*_conditioning",))
    assert sentences == [
        "4 tensors missing: c, d, e and 1 more.",
        "1 tensor left over: extra.",
        "1 tensor of another shape: b is 4, expected 5.",
    ]
    assert compare_tensors({"a": (2, 3), "b": (4,)}, index, dropped=("extra", "positive*")) == []


def test_an_optional_group_is_there_or_not_but_not_half(tmp_path: Path) -> None:
    expected = {"a": (1,), "pose.weight": (1,), "pose.bias": (1,)}
    assert compare_tensors(expected, indexed(tmp_path, a=(1,)), optional=("pose.*",)) == []
    half = indexed(tmp_path, **{"a": (1,), "pose.bias": (1,)})
    assert compare_tensors(expected, half, optional=("pose.*",)) == ["1 tensor missing: pose.weight."]


def test_names_are_mapped_and_two_for_one_refused(tmp_path: Path) -> None:
    index = indexed(tmp_path, **{"model.a": (1,), "a": (2,), "b": (3,)})
    renamed = rename_tensors(index, lambda name: None if name == "a" else name.removeprefix("model."))
    assert {name: entry.shape for name, entry in renamed.tensors.items()} == {"a": (1,), "b": (3,)}
    with pytest.raises(ConfigError, match="both the model's a"):
        rename_tensors(index, lambda name: name.removeprefix("model."))


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_index(path, "torch")
    assert len(caught.value.message) < 2000
    return caught.value.code


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    save(torch.zeros(1, 64).expand(10**9, 64), path, _use_new_zipfile_serialization=zipped)
    assert refused(path) == "checkpoint_corrupt"


def zip64_end(path: Path, *, disks: int = 1, length: int = 3 << 30) -> Path:
    """A sparse file whose last bytes claim a directory of `length` bytes."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, length, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, length, disks)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(length)
        file.write(record + locator + end)
    return path


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    assert refused(zip64_end(tmp_path / "a.pth")) == "checkpoint_corrupt"


def test_an_archive_over_several_disks(tmp_path: Path) -> None:
    assert refused(zip64_end(tmp_path / "a.pth", disks=2, length=1000)) == "checkpoint_corrupt"


def test_a_record_beyond_any_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        archive.filelist[0].header_offset = (1 << 63) + 5
    assert refused(path) == "checkpoint_corrupt"


def test_a_key_too_long_to_print(tmp_path: Path) -> None:
    path = save({10**5000: torch.ones(2)}, tmp_path / "a.pth")
    assert refused(path) == "checkpoint_corrupt"
