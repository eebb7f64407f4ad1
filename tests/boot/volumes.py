"""Temporary volumes with files of the published sizes: sparse, so they take no room."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.boot.locate import HUB_CACHE
from app.boot.manifest import FileEntry, Format, Manifest, Origin
from app.boot.tensorfile import TensorIndex
from app.boot.verify import Contents


def sparse(path: Path, size: int) -> Path:
    """A file of `size` zero bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def put(root: Path, manifest: Manifest, *names: str) -> None:
    """The named files of the manifest at their places and with their sizes."""
    for name in names:
        entry = manifest.files[name]
        sparse(root / entry.path, entry.size or 1000)


def put_models(root: Path, manifest: Manifest, *models: str) -> None:
    for model in models:
        put(root, manifest, *manifest.models[model].parts.values())


def put_in_hub_cache(root: Path, origin: Origin, blob: str, size: int, revision: str | None = None) -> Path:
    """A file as the hub's client stores it: a blob, and a relative link to it in the snapshot."""
    repo = root / HUB_CACHE / f"models--{origin.repo.replace('/', '--')}"
    sparse(repo / "blobs" / blob, size)
    link = repo / "snapshots" / (revision or origin.revision or "0" * 40) / origin.filename
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(repo / "blobs" / blob, link.parent))
    return link


def safetensors(path: Path, metadata: dict[str, str], tensors: int = 1) -> Path:
    """A small safetensors file, with the hash of sha256sum's form beside it."""
    header: dict[str, object] = {"__metadata__": metadata}
    header |= {
        f"t{i}": {"dtype": "U8", "shape": [4], "data_offsets": [4 * i, 4 * i + 4]} for i in range(tensors)
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"\1" * (4 * tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    return path


def empty_index(path: Path, format: Format) -> TensorIndex:
    """Stands in for reading a file that is sparse."""
    return TensorIndex(path, format, path.stat().st_size, {})


def anything(model: object, part: str, index: TensorIndex) -> Sequence[str]:
    """Contents that are always right."""
    return ()


_: Contents = anything


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter; pytest's own is closed to all but the one who runs it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may not do everything, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def origin_of(entry: FileEntry) -> Origin:
    assert entry.origin is not None
    return entry.origin
