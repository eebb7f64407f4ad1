"""Prompts come out as the original cleans them, and what is no text is refused."""

import html
import subprocess
import sys
import time
from pathlib import Path

import ftfy
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from app.errors import UsageError
from app.models.wan.prompt import MAX_CHARACTERS, clean, clean_prompt


def original(text: str) -> str:
    """What the original does, in its own libraries."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip()


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)


@given(TEXT)
def test_any_text_is_cleaned_as_the_original_does(text: str) -> None:
    assert clean(text) == original(text)


def test_every_character_is_cleaned_as_the_original_does() -> None:
    points = [*range(1, 0x3000), *range(0xFE00, 0xFFFF), *range(0x1F300, 0x1F700)]
    for point in points:
        text = f"a {chr(point)} b"
        assert clean(text) == original(text), hex(point)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a   cat\n\n\tin a\u00a0hat ", "a cat in a hat"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a &lt;b&gt; c", "a <b> c"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("e\u0301", "é"),
        ("a\x1cb\x7f", "ab"),
        ("&#0; &#xd800;", "\ufffd \ufffd"),
        ("\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "😀"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert clean(text) == expected == original(text)


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("a\0b", "prompt_invalid", r"character 2 .*U\+0000"),
        ("cat \ud800", "prompt_invalid", r"character 5 .*U\+D800"),
        (b"cat \xff".decode("utf-8", "surrogateescape"), "prompt_invalid", r"U\+DCFF.*UTF-8"),
        ("\ude00\ud83d", "prompt_invalid", r"U\+DE00"),
        ("x" * (MAX_CHARACTERS + 1), "prompt_too_long", "20,001 characters"),
        ("", "prompt_empty", "''"),
        (" \n\t\u3000", "prompt_empty", "empty"),
        ("&nbsp;", "prompt_empty", "&nbsp;"),
        ("\x07\x1b", "prompt_empty", "empty"),
    ],
)
def test_bad_prompts_are_refused(text: str, code: str, names: str) -> None:
    with pytest.raises(UsageError, match=names) as refused:
        clean_prompt(text)
    assert refused.value.code == code


def test_the_longest_prompt_is_quick() -> None:
    begin = time.perf_counter()
    clean("ä&amp;é “x” "[:10] * (MAX_CHARACTERS // 10))
    assert time.perf_counter() - begin < 2


def test_needs_no_torch_and_waits_for_nothing() -> None:
    code = "import sys, app.models.wan.prompt; sys.exit(bool({'torch', 'ftfy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
