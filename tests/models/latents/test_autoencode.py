"""The pipeline as a person uses it from Python: the example of its document runs as it stands there."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from app.models.latents.autoencode import Session
from app.models.latents.edit_request import Noise
from app.models.latents.weights import Prune
from tests.models.latents.small import clip, codec

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "autoencode.md"


def test_the_example_of_the_document(latents_volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(example.replace("build/workspace", str(latents_volume)), {})
    assert capsys.readouterr().out.strip() == "4 (4, 3, 16, 24) (64, 96, 3)"


def test_chunks_do_not_matter(tmp_path: Path) -> None:
    made = []
    for number, sizes in enumerate(([9], [1, 3, 5], [1] * 9)):
        folder = tmp_path / str(number)
        folder.mkdir()
        frames = clip(9)
        session = Session(codec("vqvae"), partial(frames.split, sizes), (16, 24), folder)
        latents = session.latents([Noise(kind="noise", strength=0.3)], [Prune(share=0.1)])
        moments = list(session.moments(latents))
        assert len(moments) == 9 and all(
            torch.equal(moment.original, frame) for moment, frame in zip(moments, frames, strict=True)
        )
        made.append(torch.stack([moment.edited for moment in moments if moment.edited is not None]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_nothing_edited_is_nothing_decoded_twice(tmp_path: Path) -> None:
    session = Session(codec("vqvae"), lambda: [clip(5)], (16, 24), tmp_path)
    latents = session.latents()
    assert latents.edited is latents.own
    assert all(moment.edited is None for moment in session.moments(latents))
