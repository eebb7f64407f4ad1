"""Bad input to autoencode, through the command line: each case ends in one sentence that names the thing, its
value, what was expected and what to do, with a stable code and exit status; nothing is left, and what is
wrong with a request or a clip is told before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.job.test_autoencode import clip_of
from tests.test_bad_generate import begun, contents_of
from tests.test_bad_input import refused

Seedpod = Callable[..., tuple[int, str, str]]


@dataclass
class Case:
    """Arguments, with {folder} for the one that all files are in."""

    arguments: Sequence[str]
    status: int
    code: str
    parts: Sequence[str] = ()
    source: str = "{folder}/a.mp4"
    output: str = "{folder}/out"
    loads: bool = False  # whether only the loaded codec can tell


def edit(text: str, *parts: str, code: str = "request_invalid", loads: bool = False) -> Case:
    return Case(["--edits", text], 64, code, parts, loads=loads)


def weights(text: str, *parts: str, code: str = "request_invalid", loads: bool = False) -> Case:
    return Case(["--weights", text], 64, code, parts, loads=loads)


CASES = {
    "unknown edit": edit("melt amount=1", "melt", "noise"),
    "an edit of nothing": edit(""),
    "an edit without its field": edit("noise", "strength", "required"),
    "an edit with a field too many": edit("noise strength=1 taste=2", "taste"),
    "an edit with a field twice": edit("noise strength=1 strength=2", "twice"),
    "strength in words": edit("noise strength=much", "strength", "number"),
    "strength nan": edit("noise strength=nan", "strength"),
    "strength inf": edit("noise strength=inf", "strength"),
    "strength too high": edit("noise strength=11", "strength", "10"),
    "seed too high": edit("noise strength=1 seed=9223372036854775808", "seed"),
    "bits 0": edit("quantise bits=0", "bits", "1"),
    "sigma 0": edit("smooth sigma=0", "sigma"),
    "a mask inside out": edit("mask top=0.5 bottom=0.2", "top 0.5", "bottom 0.2"),
    "three corners": edit("grid corners=a,a,a", "corners", "4"),
    "a moment beyond the clip": edit("path points=a@1.5", "1"),
    "JSON that breaks off": edit('{"kind": "noise"', "JSON"),
    "a clip nobody knows": edit("interpolate clip=z", "'z'", "'b'"),
    "a clip that is not given": edit("interpolate clip=b", "'b'", "give", code="clip_unknown"),
    "channel too high": edit("scale factor=2 channels=4", "channel 4", "0 to 3",
                             code="channel_unknown", loads=True),
    "channel negative": edit("scale factor=2 channels=-1", "channels"),
    "a grid for a long clip": edit("grid corners=a,a,a,a rows=9 columns=9", "9 x 9", "2 latents",
                                   code="grid_too_fine", loads=True),
    "too many edits": Case(["--edits", "shuffle"] * 33, 64, "request_invalid", ["32"]),
    "unknown change": weights("melt", "melt"),
    "share too high": weights("prune share=1.5", "share"),
    "layers nobody has": weights("scale factor=2 layers=encodr.*", "encodr.*",
                                 code="weights_layer_unknown", loads=True),
    "weights of no model": Case(["--weights", "interpolate amount=1 other=none"], 78, "model_unknown",
                                ["none"]),
    "weights of another task": weights("interpolate amount=1 other=nano", "restore", code="model_wrong_task"),
    "weights of another shape": weights("interpolate amount=1 other=nano-wan-vae", "nano-wan-vae",
                                        code="weights_other_differs", loads=True),
    "unknown model": Case(["--model", "none"], 78, "model_unknown", ["none"]),
    "model of another task": Case(["--model", "nano"], 64, "model_wrong_task", ["restore"]),
    "unknown fit": Case(["--fit", "crop"], 64, "request_invalid", ["'crop'", "reflect"]),
    "frames 0": Case(["--frames", "0"], 64, "request_invalid", ["frames is '0'"]),
    "short side 8": Case(["--short-side", "8"], 64, "request_invalid", ["short_side is '8'", "16"]),
    "short side too large": Case(["--short-side", "4096"], 65, "output_too_large", ["SEEDPOD_MAX_PIXELS"]),
    "a long strip": Case(["--short-side", "16"], 65, "size_invalid", ["16384"], source="{folder}/strip.png"),
    "quality 52": Case(["--quality", "52"], 64, "request_invalid", ["quality"]),
    "unknown codec": Case(["--codec", "hevc10"], 64, "request_invalid", ["codec"]),
    "no such clip": Case([], 65, "input_missing", ["none.mp4"], source="{folder}/none.mp4"),
    "text": Case([], 65, "input_not_video", ["text.mp4"], source="{folder}/text.mp4"),
    "empty file": Case([], 65, "input_empty", ["empty.mp4"], source="{folder}/empty.mp4"),
    "clip b is text": Case(["--b", "{folder}/text.mp4"], 65, "input_not_video", ["text.mp4"]),
    "clip c is missing": Case(["--c", "{folder}/none.mp4"], 65, "input_missing", ["none.mp4"]),
    "clip b is a folder": Case(["--b", "{folder}/bare"], 65, "input_is_folder", ["bare"]),
    "folder without clips": Case([], 65, "folder_empty", ["bare", ".mp4"], source="{folder}/bare"),
    "output not empty": Case([], 74, "output_exists", ["full"], output="{folder}/full"),
    "output is a file": Case([], 74, "output_exists", ["a.mp4"], output="{folder}/a.mp4"),
    "output in no folder": Case([], 74, "output_folder_missing", ["no"], output="{folder}/no/out"),
    "output of a folder is full": Case([], 74, "output_exists", source="{folder}", output="{folder}/full"),
    "output with a long name": Case([], 74, "output_unwritable", output="{folder}/" + "x" * 300),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bad")
    clip_of(made / "a.mp4", 5, 16, 24)
    (made / "text.mp4").write_text("no clip, just words\n" * 40)
    (made / "empty.mp4").write_bytes(b"")
    (made / "bare").mkdir()
    (made / "full").mkdir()
    (made / "full/notes.txt").write_text("keep")
    Image.new("RGB", (2000, 1), (200, 90, 30)).save(made / "strip.png")
    return made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(case: Case, folder: Path, latents_volume: Path, seedpod: Seedpod) -> None:
    before = contents_of(folder)
    source, output, *arguments = (
        text.replace("{folder}", str(folder)) for text in (case.source, case.output, *case.arguments)
    )
    model = [] if "--model" in arguments else ["--model", "nano-vqvae"]
    outcome = seedpod("run", "autoencode", source, "-o", output, "--report", "false", *model, *arguments,
                      SEEDPOD_ROOTS=latents_volume, SEEDPOD_STAGE="off")  # fmt: skip
    refused(outcome, case.status, case.code, *case.parts)
    assert contents_of(folder) == before
    assert case.loads or begun(outcome) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_may_not_be_written(
    folder: Path, latents_volume: Path, seedpod: Seedpod, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = seedpod("run", "autoencode", folder / "a.mp4", "-o", tmp_path / "locked/out", "--report", "no",
                      "--model", "nano-vqvae", SEEDPOD_ROOTS=latents_volume)  # fmt: skip
    refused(outcome, 74, "output_unwritable", "locked")
