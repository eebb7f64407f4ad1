"""A prompt file is a prompt embedding, or it is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.boot.tensorfile import TensorEntry, TensorIndex
from app.models.seedvr2.parts import contents


def prompt(*shape: int, dtype: str = "BF16") -> list[str]:
    entry = TensorEntry("", dtype, shape, 0, 0)
    return contents("7b", "positive", TensorIndex(Path("pos_emb.pt"), "torch", 0, {"": entry}))


@pytest.mark.parametrize("shape", [(58, 5120), (1, 58, 5120), (1, 5120), (512, 5120)])
def test_prompt_embeddings(shape: tuple[int, ...]) -> None:
    assert prompt(*shape) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "word"),
    [
        ((10**9, 5120), "F32", "1 to 512 tokens"),
        ((0, 5120), "F32", "1 to 512 tokens"),
        ((2, 58, 5120), "F32", "(tokens)x5120"),
        ((58, 64), "F32", "(tokens)x5120"),
        ((), "F32", "(tokens)x5120"),
        ((58, 5120), "I64", "I64"),
    ],
)
def test_what_is_no_prompt_embedding(shape: tuple[int, ...], dtype: str, word: str) -> None:
    (sentence,) = prompt(*shape, dtype=dtype)
    assert word in sentence
