"""The autoencode task with the VQ-VAE: whatever the clip, as many frames come back, as large; and what is
left, which is all or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from app.errors import InputError, JobStopped, SeedpodError, UnavailableError, UsageError
from app.job import autoencode
from app.job.autoencode import AutoencodeResult, run_autoencode
from app.job.autoencode_plan import plan_autoencode
from app.job.autoencode_request import AutoencodeRequest
from app.job.request import parse
from app.job.result import Limits
from app.memory import Need, Room
from app.models.latents.codecs import ImageCodec, VQCodec
from app.models.latents.fitting import Fit
from app.models.latents.metal import lacks_operation
from app.progress import Silent
from app.video.probe import probe
from app.video.read import read_frames
from app.video.write import VideoWriter
from tests.models.latents.small import codec as small_codec

LIMITS = Limits(1 << 22, 100_000)
EVERY_EDIT = [
    {"kind": "noise", "strength": 0.1, "seed": 3},
    {"kind": "scale", "factor": 0.9, "bias": 0.1, "channels": [0]},
    {"kind": "smooth", "sigma": 1},
    {"kind": "sharpen"},
    {"kind": "interpolate", "clip": "b", "weight": 0, "end_weight": 1, "method": "spherical"},
    {"kind": "path", "points": [{"clip": "a", "at": 0}, {"clip": "b"}]},
    {"kind": "grid", "corners": [{"clip": "a"}, {"clip": "b"}, {"clip": "c"}, {"clip": "a", "at": 1}],
     "rows": 2, "columns": 2},
    {"kind": "arithmetic", "factor": 0.5},
    {"kind": "motion", "amount": 0.5, "still_from": "c"},
    {"kind": "quantise", "bits": 4},
    {"kind": "mask", "right": 0.5, "clip": "b"},
    {"kind": "shuffle", "block": 2, "seed": 9},
]  # fmt: skip
EVERY_CHANGE = [
    {"kind": "scale", "factor": 1.1},
    {"kind": "noise", "strength": 0.05, "seed": 1},
    {"kind": "prune", "share": 0.1},
    {"kind": "quantise", "bits": 8},
    {"kind": "interpolate", "amount": 0.5, "other": "second"},
]


@pytest.fixture
def codec() -> VQCodec:
    made = small_codec("vqvae")
    assert isinstance(made, VQCodec)
    return made


def clip_of(path: Path, frames: int, height: int, width: int, seed: int = 0) -> Path:
    drawn = np.random.default_rng(seed).integers(60, 250, (1, height, width, 3), np.uint8)
    with VideoWriter(
        path, width, height, 25, codec="lossless" if path.suffix == ".mkv" else "h264"
    ) as writer:
        for number in range(frames):
            writer.write(np.roll(drawn, number, 2))
    return path


def do(
    vqvae: Any, source: Path, output: Path, others: dict[str, Path] | None = None,
    on_step: Callable[[], None] = lambda: None, models: Any = None, **asked: Any,
) -> AutoencodeResult:  # fmt: skip
    request = parse(AutoencodeRequest, {"report": False, **asked})
    job = plan_autoencode(request, source, others or {}, output, LIMITS)
    return run_autoencode(vqvae, "nano", job, Silent(), on_step, models)


def frames_in(path: Path) -> list[np.ndarray]:
    return [frame.copy() for frame in read_frames(path, probe(path))]


def bytes_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("frames", "fit"), [(1, "reflect"), (2, "edge"), (5, "resize"), (6, "reflect"), (13, "resize")]
)
def test_every_length(codec: VQCodec, frames: int, fit: str, tmp_path: Path) -> None:
    source = clip_of(tmp_path / "in.mkv", frames, 18, 27)
    result = do(codec, source, tmp_path / "out", fit=fit, codec="lossless",
                edits=[{"kind": "noise", "strength": 0.3}])  # fmt: skip
    assert (result.frames, result.height, result.width) == (frames, 18, 27)
    for name in ("original", "reconstructed", "edited"):
        shown = frames_in(tmp_path / "out" / f"{name}.mkv")
        assert len(shown) == frames and shown[0].shape == (18, 27, 3)
        assert min(frame.max() for frame in shown) > 0  # never black
    original = frames_in(tmp_path / "out/original.mkv")
    np.testing.assert_array_equal(original, frames_in(source))


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 9), (40, 1), (2, 2), (17, 16), (64, 16), (16, 64), (33, 31), (8, 600), (600, 8)],
)
def test_every_size_and_orientation(codec: VQCodec, height: int, width: int, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.new("RGB", (width, height), (200, 120, 90)).save(picture)
    result = do(codec, picture, tmp_path / "out", codec="lossless")
    assert (result.height, result.width, result.frames) == (height, width, 1)
    (shown,) = frames_in(tmp_path / "out/reconstructed.mkv")
    assert shown.shape == (height, width, 3)
    assert probe(tmp_path / "out/side_by_side.mkv").frames == 1
    assert do(codec, picture, tmp_path / "as-h264").height == height


def test_turned_clips_come_back_upright(codec: VQCodec, tmp_path: Path) -> None:
    plain, turned = clip_of(tmp_path / "a.mp4", 5, 32, 48), tmp_path / "b.mp4"
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(plain),
         "-c", "copy", str(turned)],
        check=True,
    )  # fmt: skip
    result = do(codec, turned, tmp_path / "out")
    assert (result.height, result.width, result.frames) == (48, 32, 5)


def test_alpha_and_animations(codec: VQCodec, tmp_path: Path) -> None:
    pictures = [Image.new("RGBA", (20, 12), (250, 40 * i, 9, 255)) for i in range(4)]
    pictures[0].save(tmp_path / "in.gif", save_all=True, append_images=pictures[1:], duration=40)
    assert do(codec, tmp_path / "in.gif", tmp_path / "gif").frames == 4
    Image.new("RGBA", (20, 12), (250, 200, 9, 128)).save(tmp_path / "in.png")
    assert do(codec, tmp_path / "in.png", tmp_path / "png").frames == 1
    Image.new("L", (20, 12), 130).save(tmp_path / "grey.png")
    assert do(codec, tmp_path / "grey.png", tmp_path / "grey").frames == 1


def test_a_wide_clip_is_shown_smaller_beside_itself(codec: VQCodec, tmp_path: Path) -> None:
    Image.new("RGB", (8000, 16), (200, 120, 90)).save(tmp_path / "in.png")
    result = do(codec, tmp_path / "in.png", tmp_path / "out")
    assert result.width == 8000 and probe(tmp_path / "out/side_by_side.mp4").width <= autoencode.WIDEST


def test_everything_at_once_and_the_same_bytes_twice(codec: VQCodec, tmp_path: Path) -> None:
    """Every edit and every change of weights in one request, with its report."""
    pytest.importorskip("sklearn")
    clips = {name: clip_of(tmp_path / f"{name}.mp4", 17, 32, 48, seed) for seed, name in enumerate("abc")}
    second = {"second": {name: tensor + 0.01 for name, tensor in codec.module.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in codec.module.state_dict().items()}
    for name in ("one", "two"):
        result = do(codec, clips["a"], tmp_path / name, {"b": clips["b"], "c": clips["c"]}, models=second,
                    edits=EVERY_EDIT, weights=EVERY_CHANGE, report=True)  # fmt: skip
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert set(result.files) == set(bytes_of(tmp_path / "one"))
    assert {"original.mp4", "reconstructed.mp4", "edited.mp4", "side_by_side.mp4", "sheet.png",
            "report.json", "report.html"} < set(result.files)  # fmt: skip
    assert result.edited is not None and result.edited["psnr"] != result.reconstructed["psnr"]
    told = json.loads((tmp_path / "one/report.json").read_text())
    assert len(told["edits"]) == len(EVERY_EDIT) and len(told["weights"]) == len(EVERY_CHANGE)
    for name, tensor in codec.module.state_dict().items():  # bit for bit what it was
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("edit", EVERY_EDIT, ids=lambda edit: edit["kind"])
def test_each_edit(codec: VQCodec, edit: dict[str, Any], tmp_path: Path) -> None:
    clips = {name: clip_of(tmp_path / f"{name}.mp4", 17, 16, 16, seed) for seed, name in enumerate("abc")}
    result = do(codec, clips["a"], tmp_path / "out", {"b": clips["b"], "c": clips["c"]}, edits=[edit])
    assert result.frames == 17 and len(frames_in(tmp_path / "out/edited.mp4")) == 17


def test_a_change_of_weights_alone_is_an_edit(codec: VQCodec, tmp_path: Path) -> None:
    source = clip_of(tmp_path / "in.mp4", 5, 16, 16)
    result = do(codec, source, tmp_path / "out", weights=[{"kind": "scale", "factor": 0.5}])
    assert result.edited is not None and "edited.mp4" in result.files
    plain = do(codec, source, tmp_path / "plain")
    assert plain.edited is None and plain.reconstructed == result.reconstructed


def test_the_result_goes_into_an_empty_folder(codec: VQCodec, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = do(codec, clip_of(tmp_path / "in.mp4", 3, 16, 16), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result.files)


def test_resized_first(codec: VQCodec, tmp_path: Path) -> None:
    result = do(codec, clip_of(tmp_path / "in.mp4", 5, 32, 64), tmp_path / "out", short_side=16, frames=2)
    assert (result.height, result.width, result.frames) == (16, 32, 2)
    shape = result.latents
    assert result.compression == round(2 * 16 * 32 * 3 / math.prod(shape), 2)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"edits": [{"kind": "noise", "strength": 1, "channels": [4]}]}, "channel_unknown"),
        ({"edits": [{"kind": "scale", "factor": 2, "channels": [900]}]}, "channel_unknown"),
        ({"weights": [{"kind": "scale", "factor": 2, "layers": ["nothing.*"]}]}, "weights_layer_unknown"),
        ({"weights": [{"kind": "interpolate", "amount": 0.5, "other": "x"}]}, "weights_other_unknown"),
        ({"weights": [{"kind": "interpolate", "amount": 0.5, "other": "odd"}]}, "weights_other_differs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_encoded(
    codec: VQCodec, asked: dict[str, Any], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncounted(monkeypatch)
    monkeypatch.setattr(codec, "encode", lambda frames: pytest.fail("encoded"), raising=False)
    source = clip_of(tmp_path / "in.mp4", 5, 16, 16)
    odd = {"odd": {name: tensor[..., None] for name, tensor in codec.module.state_dict().items()}}
    with pytest.raises(UsageError) as error:
        do(codec, source, tmp_path / "out", models=odd, **asked)
    assert error.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_wild_weights_make_no_black_video(codec: VQCodec, tmp_path: Path) -> None:
    """Numbers that overflow are refused, in words; nothing is written in their place."""
    source = clip_of(tmp_path / "in.mp4", 5, 16, 16)
    wild = [{"kind": "scale", "factor": 100.0, "layers": ["*"]}] * 32
    try:
        do(codec, source, tmp_path / "out", weights=wild)
    except InputError as error:
        assert error.code in ("latents_not_finite", "frames_not_finite")
        assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    else:
        assert all(np.isfinite(frame).all() for frame in frames_in(tmp_path / "out/edited.mp4"))


def test_it_can_be_stopped_at_every_step(codec: VQCodec, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    source = clip_of(tmp_path / "in.mp4", 9, 16, 16)
    steps: list[int] = []
    asked = {"report": True, "edits": [{"kind": "smooth", "sigma": 1}]}
    do(codec, source, tmp_path / "whole", on_step=lambda: steps.append(1), **asked)
    in_all = len(steps)

    def stop() -> None:
        steps.append(1)
        if len(steps) == moments[0]:
            raise JobStopped("job_cancelled", "stopped")

    moments = [1, in_all // 3, 2 * in_all // 3, in_all]
    while moments:
        steps.clear()
        with pytest.raises(JobStopped):
            do(codec, source, tmp_path / "out", on_step=stop, **asked)
        assert {path.name for path in tmp_path.iterdir()} == {"in.mp4", "whole"}
        del moments[0]


def test_the_first_frames_of_a_clip_that_is_too_long(codec: VQCodec, tmp_path: Path) -> None:
    source, limits = clip_of(tmp_path / "in.mp4", 30, 16, 16), Limits(1 << 20, 10)
    for asked in ({}, {"frames": 11}):
        with pytest.raises(InputError) as error:
            plan_autoencode(AutoencodeRequest(report=False, **asked), source, {}, tmp_path / "o", limits)
        assert error.value.code == "input_too_large"
    request = AutoencodeRequest(report=False, frames=10)
    job = plan_autoencode(request, source, {}, tmp_path / "out", limits)
    assert run_autoencode(codec, "nano", job, Silent()).frames == 10


def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job will take is not counted, by passing nothing through a codec: it is one that fails."""
    found = Fit(None, Need(0, 0), Room(0, 0, apart=False))
    monkeypatch.setattr(autoencode, "_fit", lambda codec, job: found)


def test_the_way_that_was_taken_is_told(codec: VQCodec, tmp_path: Path) -> None:
    result = do(codec, clip_of(tmp_path / "in.mp4", 2, 16, 16), tmp_path / "out")
    assert result.memory.startswith("a latent at a time: up to ")


def test_what_cannot_fit_is_refused_before_anything_is_encoded(
    codec: VQCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.memory.free_bytes", lambda device: 1000)
    with pytest.raises(UnavailableError) as error:
        do(codec, clip_of(tmp_path / "in.mp4", 2, 64, 96), tmp_path / "out")
    assert error.value.code == "memory_short"
    for part in ("A clip of 96x64 takes up to", "of the machine's", "a latent at a time", "short_side"):
        assert part in error.value.message, part
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_where_memory_ended_for_one_clip_says_nothing_of_the_next(tmp_path: Path) -> None:
    images = copy.copy(small_codec("sd-vae"))
    assert isinstance(images, ImageCodec)
    images.most = 1
    result = do(images, clip_of(tmp_path / "in.mp4", 5, 16, 16), tmp_path / "out")
    assert result.memory.startswith("5 frames at once: up to ")
    assert (images.batch, images.most) == (5, None)


def test_memory_that_ends_is_told(codec: VQCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(frames: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    uncounted(monkeypatch)
    monkeypatch.setattr(codec, "encode", full, raising=False)
    with pytest.raises(UnavailableError) as error:
        do(codec, clip_of(tmp_path / "in.mp4", 2, 16, 16), tmp_path / "out")
    assert error.value.code == "out_of_memory" and "short_side" in error.value.message


def test_what_metal_lacks_runs_on_the_cpu(
    codec: VQCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac: the first try fails, the second is whole, and says so."""
    encode, tries = codec.encode, []

    def lacking(frames: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise NotImplementedError(
                "The operator 'aten::x' is not currently implemented for the MPS device."
            )
        return encode(frames)

    uncounted(monkeypatch)
    monkeypatch.setattr(codec, "encode", lacking, raising=False)
    monkeypatch.setattr(autoencode, "device_of", lambda codec: torch.device("mps"))
    result = do(codec, clip_of(tmp_path / "in.mp4", 2, 16, 16), tmp_path / "out")
    assert "aten::x" in result.notes[-1] and "CPU" in result.notes[-1] and result.device == "cpu, float32"


@pytest.mark.parametrize(
    ("device", "error", "lacks"),
    [
        ("mps", NotImplementedError("aten::x is not currently implemented for the MPS device"), True),
        ("mps", TypeError("Cannot convert a MPS Tensor to float64 dtype"), True),
        ("mps", RuntimeError("Conv3D is not supported on MPS"), True),
        ("mps", RuntimeError("MPS backend out of memory"), False),
        ("mps", ValueError("MPS"), False),
        ("cuda", NotImplementedError("MPS"), False),
        ("mps", InputError("x", "MPS"), False),
    ],
)
def test_which_errors_are_metals(device: str, error: Exception, lacks: bool) -> None:
    assert lacks_operation(torch.device(device), error) == lacks


def test_errors_are_ours() -> None:
    assert not issubclass(SeedpodError, RuntimeError)  # or they would be taken for the device's
