"""Embeddings come back bit for bit, or not at all; what is kept is bounded."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.models.wan.embeddings import FOLDER, EmbeddingCache, embedding_key

KEY = embedding_key("a cat", "11" * 32, "22" * 32)


def embedding(seed: int = 0, tokens: int = 6, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def file_of(folder: Path, key: str = KEY) -> Path:
    return folder / FOLDER / f"{key}.safetensors"


def keys(count: int) -> list[str]:
    return [embedding_key(str(i), "", "") for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_process_gets_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    EmbeddingCache(tmp_path).put(KEY, embedding(dtype=dtype))
    found = EmbeddingCache(tmp_path).get(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, embedding(dtype=dtype))
    assert list((tmp_path / FOLDER).iterdir()) == [file_of(tmp_path)]


def test_all_that_decides_is_in_the_key() -> None:
    others = {
        embedding_key("a cat", "11" * 32, "33" * 32),
        embedding_key("a cat", "33" * 32, "22" * 32),
        embedding_key("a cat ", "11" * 32, "22" * 32),
        embedding_key("a ca", "t" + "11" * 32, "22" * 32),
    }
    assert len(others | {KEY}) == 5


def test_without_a_folder_memory_remembers(tmp_path: Path) -> None:
    cache = EmbeddingCache(None)
    assert cache.get(KEY) is None
    cache.put(KEY, embedding())
    assert cache.get(KEY) is not None
    assert EmbeddingCache(None).get(KEY) is None


def test_disk_is_left_alone_if_told_so(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put(KEY, embedding(), disk=False)
    assert not list(tmp_path.iterdir())
    EmbeddingCache(tmp_path).put(KEY, embedding())
    assert EmbeddingCache(tmp_path).get(KEY, disk=False) is None


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: content + b"\0",
        lambda content: b"<!DOCTYPE html>" + content,
        lambda content: b"\xff" * 100,
        lambda content: (1 << 60).to_bytes(8, "little") + content[8:],
        flipped,
        lambda content: content.replace(b"[6,8]", b"[8,6]"),
        lambda content: content.replace(b"BF16", b"I16 ").replace(b'"I16 "', b'"I16"'),
        lambda content: content.replace(KEY.encode(), b"0" * 64),
    ],
)
def test_a_broken_file_counts_as_none_and_is_replaced(tmp_path: Path, damage) -> None:
    EmbeddingCache(tmp_path).put(KEY, embedding())
    path = file_of(tmp_path)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    cache = EmbeddingCache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, embedding())
    again = EmbeddingCache(tmp_path).get(KEY)
    assert again is not None
    assert torch.equal(again, embedding())


def test_another_keys_file_counts_as_none(tmp_path: Path) -> None:
    other = keys(1)[0]
    EmbeddingCache(tmp_path).put(other, embedding())
    file_of(tmp_path, other).rename(file_of(tmp_path))
    assert EmbeddingCache(tmp_path).get(KEY) is None


def test_a_folder_that_cannot_be_used_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    cache = EmbeddingCache(tmp_path)
    cache.put(KEY, embedding())
    assert cache.get(KEY) is not None
    assert EmbeddingCache(tmp_path).get(KEY) is None


def test_a_folder_or_a_pipe_in_the_place_of_a_file(tmp_path: Path) -> None:
    for make in (Path.mkdir, os.mkfifo):
        folder = tmp_path / make.__name__
        file_of(folder).parent.mkdir(parents=True)
        make(file_of(folder))
        cache = EmbeddingCache(folder)
        assert cache.get(KEY) is None
        cache.put(KEY, embedding())
        assert cache.get(KEY) is not None


def test_a_planted_link_is_replaced_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).symlink_to(precious)
    EmbeddingCache(tmp_path).put(KEY, embedding())
    assert precious.read_text() == "mine"
    assert EmbeddingCache(tmp_path).get(KEY) is not None


def test_memory_keeps_the_most_recently_used() -> None:
    cache = EmbeddingCache(None, memory_bytes=3 * embedding().nbytes)
    first, *others = keys(5)
    cache.put(first, embedding())
    for i, key in enumerate(others):
        cache.put(key, embedding(i))
        assert cache.get(first) is not None
    assert [key in cache._memory for key in (first, *others)] == [True, False, False, True, True]


def test_one_that_is_larger_than_the_bound_is_still_remembered() -> None:
    cache = EmbeddingCache(None, memory_bytes=1)
    cache.put(KEY, embedding())
    assert cache.get(KEY) is not None


def test_disk_is_bounded_and_the_least_recently_used_go(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path).put(KEY, embedding())
    size = file_of(tmp_path).stat().st_size
    used = keys(4)
    for i, key in enumerate(used):
        EmbeddingCache(tmp_path).put(key, embedding(i))
        os.utime(file_of(tmp_path, key), (time.time() - 1000 + i,) * 2)
    os.utime(file_of(tmp_path), (time.time() - 2000,) * 2)
    EmbeddingCache(tmp_path).get(KEY)  # used just now
    last = embedding_key("last", "", "")
    EmbeddingCache(tmp_path, disk_bytes=3 * size + 10).put(last, embedding())
    left = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert left == {f"{key}.safetensors" for key in (KEY, used[3], last)}


def test_old_files_go_and_those_of_others_stay(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    old = time.time() - 40 * 86400
    names = ["notes.txt", f".{'a' * 16}.part", f"{keys(1)[0]}.safetensors", "x.safetensors"]
    for name in names:
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (old, old))
    fresh = folder / f".{'b' * 16}.part"
    fresh.write_bytes(b"x")
    EmbeddingCache(tmp_path).put(KEY, embedding())
    left = {path.name for path in folder.iterdir()}
    assert left == {"notes.txt", "x.safetensors", fresh.name, f"{KEY}.safetensors"}
