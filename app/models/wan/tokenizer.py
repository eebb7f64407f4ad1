"""UMT5's tokenizer, from its tokenizer.json: text to token ids, as transformers' T5TokenizerFast.

It runs on the `tokenizers` library alone, which is what transformers runs on too, and is ready in a
fraction of the time. Torch-free. It knows nothing of cleaning (`prompt.py`) or of embeddings.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.boot.regular import open_regular
from app.errors import ConfigError, FileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LENGTH = 512  # tokens that the model reads, the end of the text among them
SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
END = SPECIAL["</s>"]
_LARGEST = 256 << 20  # bytes; the published file has 17 MB


@dataclass(frozen=True)
class Tokens:
    """A text's tokens.

    `ids` are at most `LENGTH`, the end token last; `total` counts those of the whole text; `cut` is the
    part of the text that the model does not read, "" as a rule.
    """

    ids: tuple[int, ...]
    total: int
    cut: str

    @property
    def note(self) -> str | None:
        """What to tell the person whose prompt was cut, in a sentence; None if it was not."""
        if self.total <= LENGTH:
            return None
        start = self.cut[:60] + ("…" if len(self.cut) > 60 else "")
        return (
            f"the prompt has {self.total:,} tokens and the model reads {LENGTH}: the last "
            f"{len(self.cut):,} characters are not read, from {start!r} on; shorten it."
        )


class Tokenizer:
    """The tokenizer of the file at `path`; `sha256` is the file's."""

    def __init__(self, path: Path) -> None:
        """Raises:
        ConfigError: `tokenizer_missing`, `tokenizer_broken`, or `tokenizer_wrong` for another model's.
        FileError: `file_unreadable`.
        """
        content = _read(path)
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._backend = _parse(path, content)
        wrong = _differences(self._backend)
        if wrong:
            raise ConfigError(
                "tokenizer_wrong",
                f"{path} is not the tokenizer of UMT5: {wrong}; put google/umt5-xxl/tokenizer.json of "
                "Wan 2.1 there.",
            )

    @property
    def vocab(self) -> int:
        """How many ids there are: one more than the largest. The model's table has at least as many rows."""
        return max(self._backend.get_vocab().values()) + 1

    def __call__(self, text: str) -> Tokens:
        """The tokens of a cleaned text, which may be empty: it then is the end token alone."""
        encoding = self._backend.encode(text)
        ids, total = encoding.ids, len(encoding.ids)
        if total <= LENGTH:
            return Tokens(tuple(ids), total, "")
        kept = LENGTH - 1
        return Tokens((*ids[:kept], END), total, text[encoding.offsets[kept][0] :])


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            "tokenizer_missing",
            f"{path} is not there; expected UMT5's tokenizer: put google/umt5-xxl/tokenizer.json of Wan 2.1 "
            "there, beside the checkpoint of the text encoder.",
        ) from error
    except OSError as error:
        raise FileError(
            "file_unreadable",
            f"{path} cannot be read: {error.strerror or error}; expected UMT5's tokenizer.json.",
        ) from error
    if len(content) > _LARGEST:
        raise _broken(path, f"it is larger than {_LARGEST:,} bytes")
    return content


def _parse(path: Path, content: bytes) -> Backend:
    from tokenizers import Tokenizer as Backend

    if not content.lstrip().startswith(b"{"):
        start = " ".join(content[:40].decode("utf-8", "replace").split())
        raise _broken(path, f"its {len(content):,} bytes begin with {start!r}" if content else "it is empty")
    try:
        backend = Backend.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise _broken(path, str(error).splitlines()[0][:200]) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _broken(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "tokenizer_broken",
        f"{path} is not a tokenizer.json as the tokenizers library writes it: {why}; download "
        "google/umt5-xxl/tokenizer.json of Wan 2.1 again.",
    )


def _differences(backend: Backend) -> str:
    """Why this cannot be UMT5's tokenizer; "" if it may be."""
    for piece, number in SPECIAL.items():
        if backend.token_to_id(piece) != number:
            return f"{piece} has the id {backend.token_to_id(piece)}, expected {number}"
    ids = backend.encode("a").ids
    if ids[-1:] != [END] or END in ids[:-1]:
        return f"it makes 'a' the tokens {ids[:8]}, expected the end token {END} at their end"
    return ""
