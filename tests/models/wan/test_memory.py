"""Predicted against measured on a CPU, where tensors can be counted; the published sizes by arithmetic."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from app.memory import KERNELS, Room
from app.models.wan.length import length
from app.models.wan.memory import Choice, Estimate, Task
from app.models.wan.umt5_config import UMT5_XXL
from benchmarks.memory_generate import CASES, SIZE, T5, card_estimate, measured, predicted, published
from tests.models.wan import nano
from tests.models.wan.nano import options

GB = 10**9
CLIP = replace(options(81), height=SIZE[0], width=SIZE[1])


@cache
def estimate() -> Estimate:
    return card_estimate()


@pytest.mark.parametrize("name", CASES)
def test_predicted_peaks_are_those_measured(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    expected, found = predicted(case), measured(case)
    with capsys.disabled():
        print(f"\n{name}: predicted {expected / 1e6:.1f} MB, measured {found / 1e6:.1f} MB")
    assert 0.97 < expected / found < 1.03


def test_an_image_and_its_pose_are_counted(
    wan_volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("app.memory.free_bytes", lambda device: GB)
    files = nano.sources(wan_volume, transformer=nano.image_transformer(tmp_path / "i2v.pt"))
    made = nano.load(files, eager=True)
    asked = replace(options(9), height=64, width=96)
    before = made.room()
    plain, posed = made.task(asked, 1), made.task(asked, 1, 9, reference=True)
    assert plain.parts == {"clip"} and posed.parts == {"clip", "pose"}
    needs = [made.estimate.need(task, Choice(None)).device for task in (plain, posed)]
    pose = made.estimate.weights(posed.parts) - made.estimate.weights(plain.parts)
    assert pose == sum(p.nbytes for p in made._pose_embedder().parameters())
    assert needs[1] >= needs[0] + pose
    clip = made.estimate.weights(plain.parts) - made.estimate.weights()
    assert clip == sum(p.nbytes for p in made._image_encoder().parameters())
    assert made.task(asked).parts == {"clip", "pose"}, "they stay"
    assert made.room().device - before.device == pytest.approx(clip + pose, abs=10_000)  # buffers


def test_weights_are_counted_as_they_are(wan_volume: Path) -> None:
    made = nano.load(wan_volume, eager=True)
    asked = options(9)
    assert made.task(asked).text == made.text.weights == made.text.nbytes_on("cpu") > 0
    assert made.estimate.weights() == sum(
        p.nbytes for part in (made._transformer, made._vae) if part for p in part.parameters()
    )
    assert estimate().weights() == pytest.approx(3.1 * GB, rel=0.02)
    from app.models.wan.umt5_config import umt5_tensors

    assert 2 * sum(torch.Size(shape).numel() for shape in umt5_tensors(UMT5_XXL).values()) == T5


def test_memory_does_not_grow_with_a_clip_and_does_with_what_it_should() -> None:
    made = estimate()

    def need(frames: int, window: int | None = None, **changes: float) -> int:
        asked = replace(CLIP, length=length(frames, "nothing", blocks=True), window=window, **changes)
        return made.need(Task(asked), Choice(window)).device

    assert need(9) < need(33) < need(81) < need(81, guidance=3.0)
    assert need(93) == need(12 * 1000 - 3)
    assert need(93) - need(93, 12) == pytest.approx(9 * 287.5e6, rel=0.01)  # a latent's keys and values
    text = made.need(Task(CLIP, text=T5), Choice(None)).device - need(81)
    assert text == T5
    away = made.need(Task(CLIP, text=T5), Choice(None, 1, "host"))
    assert away.host == T5 and away.device < need(81)
    reads = made.need(Task(CLIP, text=T5, reads="device"), Choice(None, 1, "nowhere"))
    assert T5 + made.weights() < reads.device < T5 + made.weights() + GB, "it reads before it leaves"
    beside = made.need(Task(CLIP, text=T5, reads="host"), Choice(None, 1, "nowhere"))
    assert beside.device == away.device, "a text encoder that computes on the host is never on the card"
    assert T5 < beside.host < T5 + GB, "and there, too, it reads before it leaves"


def test_a_clip_made_at_once_is_decoded_by_the_latent_in_a_fraction() -> None:
    asked = replace(CLIP, length=length(81, "nothing", blocks=False), guidance=5.0)
    whole, single = (estimate().need(Task(asked), Choice(None, decode)).device for decode in (None, 1))
    assert single < 0.25 * whole


def test_the_published_sizes_fit_their_cards() -> None:
    rooms = {gib: Room(int(0.97 * gib * 2**30), 64 * GB, apart=True) for gib in (12, 16, 24, 48)}
    rows = {(row[0], row[1]): row for row in published(rooms)}
    for name in ("832x480, 5 s", "832x480, 20 s"):
        assert "computes" in rows[name, "12 GiB"][4]
        assert [rows[name, f"{gib} GiB"][2] for gib in (16, 24, 48)] == ["21", "21", "21"]
        assert rows[name, "48 GiB"][3:5] == ["3 at a time", "card"]
        for gib, room in rooms.items():
            assert float(rows[name, f"{gib} GiB"][5]) * 1.1 * GB + KERNELS <= room.device + 0.06 * GB


@pytest.mark.parametrize("blocks", [True, False])
def test_sizes_beyond_all_reason_are_counted_in_no_time(blocks: bool) -> None:
    estimate().need(Task(CLIP), Choice(None))  # what the first count of a process imports
    frames = 1_200_009 if blocks else 1_200_001
    asked = replace(CLIP, length=length(frames, "nothing", blocks=blocks), height=4096, width=4096)
    begin = time.process_time()
    assert estimate().need(Task(asked), Choice(None, 1)).device > 100 * GB
    assert time.process_time() - begin < 4, "2 s on a machine with nothing else to do"
