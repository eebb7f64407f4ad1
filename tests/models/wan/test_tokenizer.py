"""The tokenizer gives transformers' ids, says what was cut, and refuses what is not UMT5's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConfigError, FileError
from app.models.wan.tokenizer import LENGTH, Tokenizer
from app.models.wan.umt5_config import UMT5_NANO
from tools.nano_tokenizer import nano_tokenizer

PROMPT = "A cat walks slowly across the snow at sunset, 4k detailed. Täglich 🙂 你好!"
SENTENCES = [PROMPT, "", "a", "</s> in the middle", "<extra_id_0>", "ﬁne ½ Ⅷ", "don't  STOP", "x" * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt5-xxl")
    (folder / "tokenizer.json").write_text(nano_tokenizer())
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def peer(folder: Path) -> Any:
    """transformers' fast tokenizer on the same file, called as the original calls it."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def theirs(peer: Any, text: str) -> list[int]:
    found = peer([text], padding="max_length", truncation=True, max_length=LENGTH, add_special_tokens=True)
    return [i for i, present in zip(found.input_ids[0], found.attention_mask[0], strict=True) if present]


@pytest.mark.parametrize("text", [*SENTENCES, "snow " * 511, "snow " * 512, "long 你 " * 400])
def test_ids_are_transformers(tokenizer: Tokenizer, peer: Any, text: str) -> None:
    assert list(tokenizer(text).ids) == theirs(peer, text)


def test_any_text_gets_transformers_ids(tokenizer: Tokenizer, peer: Any) -> None:
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
    def same(text: str) -> None:
        assert list(tokenizer(text).ids) == theirs(peer, text)

    same()


def test_ids_are_those_of_the_t5_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """transformers 5 builds T5's tokenizer anew from the pieces, without bytes and normalisation: of
    plain English they make the same."""
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5TokenizerFast.from_pretrained(folder, extra_ids=0)
    for text in ("A cat walks slowly across the snow at sunset, 4k!", "unseen words zigzag", "The fire"):
        assert list(tokenizer(text).ids) == t5(text).input_ids


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer("").ids == (1,)
    assert tokenizer("a").ids[-1] == 1
    assert 2 not in tokenizer("🙂 你好").ids  # bytes, not unknown
    assert len(tokenizer("a cat in the snow").ids) == 6  # words are pieces


@pytest.mark.parametrize(("words", "total"), [(510, 511), (511, 512), (512, 513), (600, 601)])
def test_long_texts_are_cut_and_it_is_said(tokenizer: Tokenizer, words: int, total: int) -> None:
    tokens = tokenizer(
        " ".join(["snow"] * 511 + ["fire"] * (words - 511)) if words > 511 else "snow " * words
    )
    assert tokens.total == total
    assert len(tokens.ids) == min(total, LENGTH)
    assert tokens.ids[-1] == 1
    if total <= LENGTH:
        assert tokens.note is None
        assert not tokens.cut
    else:
        assert tokens.cut == " ".join(["fire"] * (words - 511))
        assert f"{total} tokens" in tokens.note
        assert "'fire" in tokens.note


def test_a_file_that_pads_and_truncates_does_not_here(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = json.loads(nano_tokenizer())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer(path)(PROMPT) == tokenizer(PROMPT)


def test_nano_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    assert nano_tokenizer() == nano_tokenizer()
    assert len(nano_tokenizer()) < 50_000
    assert tokenizer.vocab <= UMT5_NANO.vocab


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    content = json.loads(nano_tokenizer())
    change(content)
    return json.dumps(content).encode()


def swapped(content: dict[str, Any]) -> None:
    content["model"]["vocab"][:2] = content["model"]["vocab"][1::-1]
    content["added_tokens"] = []


def endless(content: dict[str, Any]) -> None:
    content["post_processor"] = None


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (None, "tokenizer_missing", "is not there"),
        (b"", "tokenizer_broken", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "tokenizer_broken", "git-lfs"),
        (b"<!DOCTYPE html><html>", "tokenizer_broken", "DOCTYPE"),
        (b"\x0a\x0e\x0a\x05<pad>\x15\0\0\0\0", "tokenizer_broken", "begin with"),  # a spiece.model
        (b"{}", "tokenizer_broken", "tokenizers library"),
        (b'{"version": "1.0"', "tokenizer_broken", "tokenizers library"),
        (nano_tokenizer().encode()[:5000], "tokenizer_broken", "tokenizers library"),
        (b"{\xff\xfe}", "tokenizer_broken", "tokenizers library"),
        (changed(swapped), "tokenizer_wrong", "<pad> has the id 1, expected 0"),
        (changed(endless), "tokenizer_wrong", "end token 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, code: str, names: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=names) as refused:
        Tokenizer(path)
    assert refused.value.code == code
    assert str(path) in refused.value.message
    assert "\n" not in refused.value.message


def test_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileError, match="cannot be read") as refused:
            Tokenizer(path)
        assert refused.value.code == "file_unreadable"


def test_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.models.wan.tokenizer import Tokenizer\n"
        "assert 'tokenizers' not in sys.modules; Tokenizer(Path(sys.argv[1]))('a cat')\n"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder / "tokenizer.json")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
