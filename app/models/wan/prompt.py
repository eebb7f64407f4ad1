"""Prompts as a person writes them, made into the text that the tokenizer reads.

The cleaning is the original's: whatever it was trained with must come out here too. Torch-free.
"""

from __future__ import annotations

import html
import re

from app.errors import UsageError

MAX_CHARACTERS = 20_000  # a model reads 512 tokens, some 2,500 characters; what is far beyond is a mistake


def clean(text: str) -> str:
    """`text` with broken encodings and HTML entities repaired and white space collapsed; may be empty.

    Raises:
        UsageError: `prompt_invalid`: it holds what is no character; `prompt_too_long`.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            "prompt_too_long",
            f"the prompt has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}; a model reads "
            "only some 2,500 of them: shorten it.",
        )
    for place, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            what = "no text" if character == "\0" else "half a character, or a byte that is not UTF-8"
            raise UsageError(
                "prompt_invalid",
                f"character {place + 1:,} of the prompt is U+{ord(character):04X}, which is {what}; "
                "expected text in UTF-8: remove it.",
            )
    import ftfy  # a tenth of a second, which commands without a prompt need not wait for

    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", repaired).strip()


def clean_prompt(text: str) -> str:
    """`clean`, for a prompt that must say something (a negative prompt need not).

    Raises:
        UsageError: `prompt_empty`, and those of `clean`.
    """
    cleaned = clean(text)
    if not cleaned:
        raise UsageError(
            "prompt_empty",
            f"the prompt is {text[:20]!r}, which is empty; expected a description of the video: "
            "what is seen, what moves, and how the camera sees it.",
        )
    return cleaned
