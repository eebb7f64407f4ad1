"""Wan's text encoder as a pipeline uses it: prompts in, embeddings out, T5 only when it is needed.

    encoder = text_encoder(config, source, tokenizer_file, device=..., cache=EmbeddingCache(folder))
    context = encoder.encode(["a cat in the snow", ""])     # (2, 512, 4096)
    encoder.offload()       # T5 to host memory; or release(): out of memory altogether

T5's 11 GB are read at the first prompt that is in no cache. It does not decide when memory is short:
its owner calls `offload` or `release`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from app.boot.checkpoint import give_back, load, loaded_bytes
from app.boot.tensorfile import read_index
from app.errors import ConfigError
from app.models.source import Source
from app.models.wan.embeddings import EmbeddingCache, embedding_key
from app.models.wan.prompt import clean
from app.models.wan.tokenizer import LENGTH, Tokenizer, Tokens
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5Config
from app.progress import Progress

_STEP = 8  # tokens pass in multiples of this: attention's fast kernels want aligned rows


class TextEncoder:
    """Embeddings of prompts, from the cache or from T5. One thread at a time."""

    def __init__(
        self,
        config: UMT5Config,
        tokenizer: Tokenizer,
        load_model: Callable[[], UMT5Encoder],
        device: torch.device,
        cache: EmbeddingCache,
        weights_sha256: str | None,
        stored_bytes: Callable[[], int],
    ) -> None:
        """load_model: makes T5 on `device`, ready; called when it is needed and not in memory.
        weights_sha256: of T5's file; None if nobody knows it, and then nothing is kept on disk.
        stored_bytes: of T5's weights in its file, whose type they keep.

        Raises:
            ConfigError: `tokenizer_wrong`: it has ids that the model has no embedding for.
        """
        if tokenizer.vocab > config.vocab:
            raise ConfigError(
                "tokenizer_wrong",
                f"{tokenizer.path} has {tokenizer.vocab:,} ids, and the text encoder has embeddings for "
                f"{config.vocab:,}; put the tokenizer.json of this text encoder there.",
            )
        self.config = config
        self.tokenizer = tokenizer
        self.device = device
        self._load_model = load_model
        self._cache = cache
        self._weights_sha256 = weights_sha256
        self._stored_bytes = stored_bytes
        self._model: UMT5Encoder | None = None

    def tokens(self, prompt: str) -> Tokens:
        """The tokens of a prompt as it is encoded. Their `note` says what is too long to be read.

        Raises:
            UsageError: `prompt_invalid`, `prompt_too_long`.
        """
        return self.tokenizer(clean(prompt))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(prompts, 512, dim) of one prompt or more, on the device, in the dtype of T5's weights; rows of
        padding are zero.

        Each prompt passes alone, so that its embedding is the same whatever stands beside it. Prompts
        may be empty, as a negative prompt is: `prompt.clean_prompt` refuses those that must not be.

        Raises:
            UsageError: `prompt_invalid`, `prompt_too_long`.
            ConfigError: `embedding_not_finite`: the weights are damaged; and those of `load`.
        """
        found = [self._embedding(clean(prompt)) for prompt in prompts]
        out = torch.zeros(len(found), LENGTH, self.config.dim, dtype=found[0].dtype, device=self.device)
        for row, embedding in zip(out, found, strict=True):
            row[: len(embedding)] = embedding
        return out

    @property
    def nbytes(self) -> int:
        """Bytes that T5 takes on the device now; 0 if it is not there."""
        return self.nbytes_on(self.device.type)

    def nbytes_on(self, kind: str) -> int:
        """Bytes that T5 takes on devices of this type now."""
        parameters = self._model.parameters() if self._model else ()
        return sum(tensor.nbytes for tensor in parameters if tensor.device.type == kind)

    @property
    def weights(self) -> int:
        """Bytes that T5 takes, or will when it is loaded.

        Raises:
            ConfigError, FileError: Its file cannot be read.
        """
        if self._model is not None:
            return sum(tensor.nbytes for tensor in self._model.parameters())
        return self._stored_bytes()

    def knows(self, prompt: str) -> bool:
        """Whether the embedding of a prompt is at hand, so that T5 need not read it.

        Raises:
            UsageError: `prompt_invalid`, `prompt_too_long`.
        """
        return self._remembered(clean(prompt)) is not None

    @property
    def loaded(self) -> bool:
        """Whether T5 is in memory, on the device or the host's."""
        return self._model is not None

    def prepare(self) -> None:
        """Load T5 now, so that the first prompt need not wait for it."""
        with torch.inference_mode(False):
            self._ready()

    def offload(self) -> None:
        """Move T5, if it is loaded, to host memory, from where the next new prompt brings it back.
        Nothing happens where the device is the CPU."""
        if self._model is not None and self.device.type != "cpu":
            self._model.to("cpu")
            give_back()

    def release(self) -> None:
        """Drop T5; the next new prompt loads it again from its file."""
        self._model = None
        give_back()

    def _embedding(self, text: str) -> Tensor:
        """(tokens, dim) of a cleaned text, without padding."""
        embedding = self._remembered(text)
        if embedding is None:
            embedding = self._encode(text)
            self._cache.put(self._key(text), embedding, disk=self._weights_sha256 is not None)
        return embedding

    def _remembered(self, text: str) -> Tensor | None:
        embedding = self._cache.get(self._key(text), disk=self._weights_sha256 is not None)
        return embedding if embedding is not None and embedding.shape[1] == self.config.dim else None

    def _key(self, text: str) -> str:
        return embedding_key(text, self.tokenizer.sha256, self._weights_sha256 or "")

    def _encode(self, text: str) -> Tensor:
        ids = self.tokenizer(text).ids
        length = -(-len(ids) // _STEP) * _STEP
        padded = torch.zeros(2, 1, length, dtype=torch.int64)
        padded[0, 0, : len(ids)] = torch.tensor(ids)
        padded[1, 0, : len(ids)] = 1
        # Not in inference mode, even if the caller is: weights that are loaded in it cannot be moved later.
        with torch.inference_mode(False), torch.no_grad():
            there = padded.to(self.device)
            out = self._ready()(there[0], there[1])[0, : len(ids)]
            embedding: Tensor = out.clone().cpu()
        if not embedding.isfinite().all():
            raise ConfigError(
                "embedding_not_finite",
                "the text encoder made numbers that are not finite of the prompt: its weights are damaged; "
                "verify them with `entrypoint.py check --full`, and use the published bfloat16 file.",
            )
        return embedding

    def _ready(self) -> UMT5Encoder:
        """T5 on its device: loaded, or brought back."""
        if self._model is None:
            self._model = self._load_model()
        return self._model.to(self.device)


def text_encoder(
    config: UMT5Config,
    source: Source,
    tokenizer: Path,
    *,
    device: torch.device,
    cache: EmbeddingCache,
    weights_sha256: str | None,
    readers: int,
    progress: Progress,
) -> TextEncoder:
    """A `TextEncoder` that loads T5 in the dtype of its file, straight to the device.

    source: T5's file; once its staged copy is gone, it is read from the original.
    tokenizer: the tokenizer.json.

    Raises:
        ConfigError: `tokenizer_missing`, `tokenizer_broken`, `tokenizer_wrong`.
        FileError: `file_unreadable`.
    """

    def load_model() -> UMT5Encoder:
        return load(
            lambda: UMT5Encoder(config), source.now(), source.format,
            device=device, readers=readers, progress=progress,
        )  # fmt: skip

    return TextEncoder(
        config, Tokenizer(tokenizer), load_model, device, cache, weights_sha256, lambda: stored_bytes(source)
    )


def stored_bytes(source: Source) -> int:
    """Bytes that T5's weights take in memory, in the types of its file.

    Raises:
        ConfigError, FileError: It cannot be read.
    """
    return loaded_bytes(read_index(source.now(), source.format))
