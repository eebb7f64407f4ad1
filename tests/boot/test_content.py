"""What is not a checkpoint is named by code and in one sentence, and nothing in it is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import nn

from app.boot.tensorfile import read_index
from app.errors import ConfigError


class Bad(NamedTuple):
    """`content` under any name is refused with `code`, in a sentence that says `says`."""

    code: str
    case: str
    content: bytes
    says: str


class Touch:
    """Pickles to a call of os.system that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def saved(value: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def archive(data: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A zip archive as torch.save writes it, with `data` as its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        out.writestr("archive/data.pkl", data)
        for name, content in records.items():
            out.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def pickled(instructions: bytes) -> bytes:
    return archive(b"\x80\x02" + instructions + b".")


def header(value: dict[str, Any] | bytes, size: int = 0) -> bytes:
    """A safetensors file with this header and `size` bytes of data."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def f32(begin: int, end: int, *shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


STATE = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5).bfloat16(), "n": torch.tensor(7)}
ZIPPED = saved(STATE)
LEGACY = saved(STATE, zipped=False)
SAFE = header({"a": f32(0, 16, 2, 2)}, 16)

DEEP = b"(" * 50_000 + b"t" * 50_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 13566090228\n" % (b"6b" * 32)
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in &middot; Hub</title></head></html>"
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>No</Message></Error>'

TORCH = [
    Bad("checkpoint_empty", "empty", b"", "0 bytes"),
    Bad("checkpoint_lfs_pointer", "pointer", POINTER, "13,566,090,228 bytes (sha256 6b6b6b6b"),
    Bad("checkpoint_html", "page", HTML, "'Sign in · Hub'"),
    Bad("checkpoint_html", "bucket error", XML, "'AccessDenied'"),
    Bad("checkpoint_not_torch", "json", b'{"error": "Entry not found"}', "Entry not found"),
    Bad("checkpoint_not_torch", "noise", bytes(range(128, 256)) * 9, "80 81 82"),
    Bad("checkpoint_not_torch", "safetensors", SAFE, "is a safetensors file"),
    Bad("checkpoint_not_torch", "archive", ZIPPED.replace(b"data.pkl", b"word.doc"), "something else"),
    Bad("checkpoint_not_torch", "torchscript", archive(b"", **{"constants.pkl": b""}), "TorchScript"),
    Bad("checkpoint_not_torch", "compressed", archive(b"x" * 99, zipfile.ZIP_DEFLATED), "compressed"),
    Bad("checkpoint_legacy_format", "tar", b"x" * 257 + b"ustar" + bytes(999), "save it again"),
    Bad("checkpoint_truncated", "4 bytes", b"PK\x03\x04", "4 bytes"),
    Bad("checkpoint_truncated", "a quarter", ZIPPED[: len(ZIPPED) // 4], "directory"),
    Bad("checkpoint_truncated", "half", ZIPPED[: len(ZIPPED) // 2], "directory"),
    Bad("checkpoint_truncated", "half a directory", ZIPPED[:-300], "directory"),
    Bad("checkpoint_truncated", "last byte", ZIPPED[:-1], "directory"),
    Bad("checkpoint_truncated", "half, legacy", LEGACY[: len(LEGACY) // 2], "needs more"),
    Bad("checkpoint_truncated", "last byte, legacy", LEGACY[:-1], "end at byte"),
    Bad("checkpoint_corrupt", "zeros", bytes(10_000), "zero bytes"),
    Bad("checkpoint_corrupt", "middle cut out", ZIPPED[:400] + ZIPPED[900:], "its record"),
    Bad("checkpoint_corrupt", "directory", ZIPPED.replace(b"PK\x01\x02", b"PK\0\0"), "directory"),
    Bad("checkpoint_corrupt", "big endian", ZIPPED.replace(b"little", b"bigbig"), "b'bigbig'"),
    Bad("checkpoint_corrupt", "no such storage", ZIPPED.replace(b"/data/0", b"/data/9"), "storage '0'"),
    Bad("checkpoint_corrupt", "legacy protocol", LEGACY.replace(b"M\xe9\x03", b"M\xe8\x03"), "1001"),
    Bad("checkpoint_corrupt", "not a pickle", archive(b"hello"), "pickle"),
    Bad("checkpoint_corrupt", "pickle without end", archive(b"\x80\x02}q\0"), "pickle"),
    Bad("checkpoint_corrupt", "empty stack", pickled(b"\x85"), "pickle"),
    Bad("checkpoint_corrupt", "unknown memo", pickled(b"h\x07"), "pickle"),
    Bad("checkpoint_corrupt", "set items of a list", pickled(b"]NNs"), "not a dict"),
    Bad("checkpoint_corrupt", "deep tuple as a storage", pickled(DEEP + b"Q"), "not a storage"),
    Bad("checkpoint_corrupt", "too many instructions", pickled(b"N" * 2_000_001), "instructions"),
    Bad("checkpoint_corrupt", "huge pickle", archive(bytes(17 << 20)), "at most"),
    Bad("checkpoint_no_tensors", "numbers only", archive(pickle.dumps({"a": 1}, 2)), "no tensors"),
    Bad("checkpoint_no_tensors", "a list in itself", pickled(b"]q\0h\0a"), "no tensors"),
    Bad("checkpoint_no_tensors", "deep tuple", pickled(DEEP), "no tensors"),
    Bad("checkpoint_no_tensors", "deep tuple as a key", pickled(b"}" + DEEP + b"Ns"), "no tensors"),
    Bad("checkpoint_no_tensors", "doubling", pickled(b")" + b"q\0h\0\x86" * 99_999), "no tensors"),
    Bad("checkpoint_unsafe", "eval", pickled(b"cbuiltins\neval\nX\x01\0\0\x001\x85R"), "builtins.eval"),
    Bad("checkpoint_unsafe", "stack global", pickled(b"\x8c\x02os\x8c\x06system\x93"), "os.system"),
    Bad("checkpoint_unsafe", "through a known name", pickled(b"ctorch\nSize.mro\n"), "torch.Size.mro"),
    Bad("checkpoint_unsafe", "module", archive(pickle.dumps(nn.Linear(1, 1), 2)), "linear.Linear"),
    Bad("checkpoint_unsafe", "call of a dtype", pickled(b"ctorch\nfloat32\n)R"), "torch.float32"),
    Bad("checkpoint_unsafe", "call of a call", pickled(b"ctorch\nSize\n)\x85R)R"), "a call of tuple"),
    Bad("checkpoint_unsafe", "INST", archive(b"(S'x'\nios\nsystem\n."), "os system"),
    Bad("checkpoint_unsafe", "OBJ", pickled(b"(ccollections\nOrderedDict\no"), "OBJ"),
    Bad("checkpoint_unsafe", "NEWOBJ", pickled(b"ccollections\nOrderedDict\n)\x81"), "NEWOBJ"),
    Bad("checkpoint_unsafe", "EXT1", pickled(b"\x82\x01"), "EXT1"),
]

SAFETENSORS = [
    Bad("checkpoint_empty", "empty", b"", "0 bytes"),
    Bad("checkpoint_lfs_pointer", "pointer", POINTER, "git lfs pull"),
    Bad("checkpoint_html", "page after blanks", b"\n " + HTML, "Sign in"),
    Bad("checkpoint_not_safetensors", "text", b"404 Not Found, really", "404 Not Found"),
    Bad("checkpoint_not_safetensors", "zip", ZIPPED, "a file of torch.save"),
    Bad("checkpoint_not_safetensors", "legacy", LEGACY, "a file of torch.save"),
    Bad("checkpoint_not_safetensors", "gguf", b"GGUF\x03\0\0\0" + bytes(99), "a GGUF file"),
    Bad("checkpoint_truncated", "half a header", SAFE[:40], "ends at byte"),
    Bad("checkpoint_truncated", "half the data", SAFE[:-8], "end at byte"),
    Bad("checkpoint_corrupt", "more data", SAFE + bytes(8), "end at byte"),
    Bad("checkpoint_corrupt", "huge header", struct.pack("<Q", 1 << 40) + b'{"a": 1}', "claims"),
    Bad("checkpoint_corrupt", "not json", header(b'{"a": nonsense}'), "header"),
    Bad("checkpoint_corrupt", "deep json", header(b'{"a":' + b"[" * 99_999), "header"),
    Bad("checkpoint_corrupt", "not utf-8", header(b'{"\xff\xfe": 1}'), "header"),
    Bad("checkpoint_corrupt", "a name twice", header(b'{"a": 1, "a": 2}'), "twice"),
    Bad("checkpoint_corrupt", "no offsets", header({"a": {"dtype": "F32", "shape": []}}), "data_offsets"),
    Bad("checkpoint_corrupt", "dtype", header({"a": f32(0, 4, 1, dtype="F31")}, 4), "F31"),
    Bad("checkpoint_corrupt", "list as dtype", header({"a": f32(0, 4, 1, dtype=[])}, 4), "header"),
    Bad("checkpoint_corrupt", "size", header({"a": f32(0, 8, 1)}, 8), "8 bytes"),
    Bad("checkpoint_corrupt", "negative", header({"a": f32(0, 16, -2, -2)}, 16), "whole numbers"),
    Bad("checkpoint_corrupt", "true", header({"a": f32(0, 4, True)}, 4), "whole numbers"),
    Bad("checkpoint_corrupt", "overlap", header({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, 12), "begins at"),
    Bad("checkpoint_corrupt", "hole", header({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, 12), "begins at"),
    Bad("checkpoint_corrupt", "metadata", header({"__metadata__": {"a": 1}}), "strings"),
    Bad("checkpoint_no_tensors", "no tensors", header({"__metadata__": {"a": "b"}}), "no tensors"),
]

ALL = [*(("torch", bad) for bad in TORCH), *(("safetensors", bad) for bad in SAFETENSORS)]


@pytest.mark.parametrize(("format", "bad"), ALL, ids=[f"{format}-{bad.case}" for format, bad in ALL])
def test_bad_files(tmp_path: Path, format: Literal["torch", "safetensors"], bad: Bad) -> None:
    path = tmp_path / "seedvr2_ema_3b.pth"
    path.write_bytes(bad.content)
    with pytest.raises(ConfigError) as caught:
        read_index(path, format)
    message = caught.value.message
    assert caught.value.code == bad.code, message
    assert message.startswith(str(path))
    assert bad.says in message
    assert len(message) < len(str(path)) + 500


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "ran"
    path = tmp_path / "a.pth"
    path.write_bytes(saved({"a": torch.ones(2), "b": Touch(trace)}, zipped))
    with pytest.raises(ConfigError, match=r"wants to use \w+\.system .* it was not run") as caught:
        read_index(path, "torch")
    assert caught.value.code == "checkpoint_unsafe"
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert trace.exists()


FILES: list[tuple[Literal["torch", "safetensors"], bytes]] = [
    ("torch", ZIPPED),
    ("torch", LEGACY),
    ("safetensors", SAFE),
]


@pytest.mark.parametrize(("format", "whole"), FILES, ids=["zip", "legacy", "safetensors"])
def test_no_beginning_of_a_file_is_taken_for_it(
    tmp_path: Path, format: Literal["torch", "safetensors"], whole: bytes
) -> None:
    path = tmp_path / "a"
    codes = set()
    for length in range(1, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError) as caught:
            read_index(path, format)
        codes.add(caught.value.code)
    assert "checkpoint_truncated" in codes
    assert codes <= {"checkpoint_truncated", f"checkpoint_not_{format}", "checkpoint_corrupt"}


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    data = saved({"a": torch.zeros(40)})
    assert data.count(b"K(\x85") == 1  # the shape (40,)
    path.write_bytes(data.replace(b"K(\x85", b"K)\x85"))
    with pytest.raises(ConfigError, match="tensor a ends at byte 164 of a storage of 160 bytes"):
        read_index(path, "torch")
