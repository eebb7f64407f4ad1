"""Embeddings of prompts, remembered in memory and on disk, so that a prompt is encoded once.

Whatever decides an embedding is in its key: the cleaned prompt, the tokenizer's file, the weights' file
and this module's `VERSION`. A file that is broken, cut off or of another key counts as none. It does
not know how an embedding is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from safetensors.torch import save
from torch import Tensor

from app.boot.checkpoint import load_tensor
from app.boot.regular import create_anew
from app.boot.tensorfile import read_index
from app.boot.tensorread import bytes_of
from app.errors import SeedpodError
from app.models.wan.prompt import clean

VERSION: Final = "umt5 1"  # raised with whatever changes an embedding: cleaning, length, arithmetic
FOLDER: Final = "embeddings"
_NAME: Final = re.compile(r"([0-9a-f]{64}\.safetensors|\.[0-9a-f]{16}\.part)")


def embedding_key(prompt: str, tokenizer_sha256: str, weights_sha256: str) -> str:
    """The name, 64 hex digits, of what these weights make of the cleaned `prompt`."""
    parts = json.dumps([VERSION, tokenizer_sha256, weights_sha256, prompt])
    return hashlib.sha256(parts.encode()).hexdigest()


def known(cache: EmbeddingCache, prompts: Iterable[str], tokenizer: Path, weights_sha256: str | None) -> bool:
    """Whether the embeddings of all these prompts are remembered, so that nothing needs the text encoder."""
    if weights_sha256 is None:
        return False
    try:
        tokens = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    except OSError:  # whoever needs it says so
        return False
    keys = [embedding_key(clean(prompt), tokens, weights_sha256) for prompt in prompts]
    return all(cache.get(key) is not None for key in keys)


class EmbeddingCache:
    """Embeddings, (tokens, width) on the CPU, by their keys; the least recently used go first.

    Several processes may share a folder. Tensors that come out are the cache's own: not to be written to.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        memory_bytes: int = 64 << 20,
        disk_bytes: int = 1 << 30,
        days: float = 30,
    ) -> None:
        """folder: the cache folder, in which `embeddings` is made; None remembers in memory alone.
        memory_bytes, disk_bytes: what it may hold. days: how long a file may lie unused."""
        self.folder = folder / FOLDER if folder else None
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self.seconds = days * 86400
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str, *, disk: bool = True) -> Tensor | None:
        """The embedding of `key`, from memory or, if `disk` may be asked, from there."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if not disk or self.folder is None:
            return None
        found = _read(self._path(key), key)
        if found is not None:
            with suppress(OSError):
                os.utime(self._path(key))
            self._remember(key, found)
        return found

    def put(self, key: str, embedding: Tensor, *, disk: bool = True) -> None:
        """Remember `embedding`. Where the disk refuses it (no room, no permission), in memory alone: that
        costs time, and changes no result."""
        self._remember(key, embedding)
        if not disk or self.folder is None:
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._path(key), key, embedding)
            self._tidy(self.folder)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _remember(self, key: str, embedding: Tensor) -> None:
        self._memory[key] = embedding
        self._memory.move_to_end(key)
        total = sum(tensor.nbytes for tensor in self._memory.values())
        while total > self.memory_bytes and len(self._memory) > 1:
            _, oldest = self._memory.popitem(last=False)
            total -= oldest.nbytes

    def _tidy(self, folder: Path) -> None:
        """Remove our files that are too old, and the least recently used of those that are too many."""
        files = []
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                with suppress(OSError):
                    facts = path.lstat()
                    files.append((facts.st_mtime, facts.st_size, path))
        oldest_allowed = time.time() - self.seconds
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            forgotten = path.suffix == ".part" and used < time.time() - 3600  # of a process that died
            if used < oldest_allowed or total > self.disk_bytes or forgotten:
                with suppress(OSError):
                    path.unlink()
                total -= size


def _read(path: Path, key: str) -> Tensor | None:
    """The embedding in the file, if it is whole and of this key."""
    try:
        metadata = read_index(path, "safetensors").metadata
        tensor = load_tensor(path, "safetensors")
    except (SeedpodError, OSError):  # none yet, or broken: the prompt is encoded again
        return None
    right = metadata.get("key") == key and metadata.get("sha256") == _digest(tensor)
    return tensor if right and tensor.ndim == 2 else None


def _write(path: Path, key: str, embedding: Tensor) -> None:
    """Write the file at once or not at all."""
    content = save({"embedding": embedding}, metadata={"key": key, "sha256": _digest(embedding)})
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(create_anew(part), "wb") as file:
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _digest(tensor: Tensor) -> str:
    about = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(about + bytes_of(tensor)).hexdigest()
