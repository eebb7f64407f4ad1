"""The ladder of the original's guide, step by step: `python -m pytest -m ladder -rs`. The first five steps
need no card and no weights; the last ones say by name what they lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.boot.manifest import read_manifest
from app.device import place
from app.models.source import Loading
from app.models.wan.clip_config import CLIP_VIT_H, clip_tensors
from app.models.wan.config import tensors
from app.models.wan.generate import Guide
from app.models.wan.load import load_generator
from app.models.wan.pose import PoseEmbedder, latents_of
from app.models.wan.pose_config import pose_tensors
from app.models.wan.transformer import Transformer
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import umt5_tensors
from app.models.wan.vae import WanVAE
from app.models.wan.vae_config import vae_tensors
from app.models.wan.variants import VARIANTS
from app.video.probe import probe
from app.video.read import read_frames
from tests.models.wan import nano
from tests.models.wan.nano import SIZE, Told, clip, options

ROOT = Path(__file__).resolve().parents[2]
MODEL = "self-forcing"
HOW = "on a machine that has both: SEEDPOD_ROOTS=FOLDER python -m pytest -m weights -s"
pytestmark = pytest.mark.ladder


def roots() -> list[Path]:
    return [Path(root) for root in os.environ.get("SEEDPOD_ROOTS", "/workspace").split(":")]


def missing() -> str:
    """What full validation lacks here; "" if it can run."""
    if not torch.cuda.is_available():
        return f"NO CUDA CARD HERE: full validation with real weights did not run; {HOW}"
    manifest = read_manifest()
    for name in manifest.models[MODEL].parts.values():
        path = manifest.files[name].path
        if not any((root / path).is_file() for root in roots()):
            return f"NO {path} HERE: full validation with real weights did not run; {HOW}"
    return ""


# ------------------------------------------------------------------ on any machine


def test_1_wiring() -> None:
    """Every part at its real size, without memory: its tensors are those that checkpoints are checked for."""
    real = VARIANTS["self-forcing-1.3b"]
    with torch.device("meta"):
        parts = [
            (Transformer(real.transformer), tensors(real.transformer)),
            (WanVAE(real.vae), vae_tensors(real.vae)),
            (UMT5Encoder(real.text), umt5_tensors(real.text)),
            (PoseEmbedder(), pose_tensors()),
        ]
    for part, expected in parts:
        have = {name: tuple(tensor.shape) for name, tensor in part.named_parameters()}
        assert have.keys() <= set(expected), type(part)
        assert all(expected[name] == shape for name, shape in have.items()), type(part)
    assert clip_tensors(CLIP_VIT_H)["visual.patch_embedding.weight"] == (1280, 3, 14, 14)


def test_2_minimal_flow(wan_volume: Path) -> None:
    """A prompt to frames, all of it."""
    frames = clip(nano.load(wan_volume), options(21))
    assert frames.shape == (21, 3, *SIZE)
    assert frames.isfinite().all() and frames.std() > 0.01


def test_3_three_latents_are_one_block(wan_volume: Path) -> None:
    """num_frame_per_block = 3, and a clip of 3: one block, without a past; a longer clip begins with it."""
    made = nano.load(wan_volume)
    asked = options(9)
    assert (asked.length.made, asked.length.block, asked.length.at_once) == (3, 3, True)
    short = list(made.generate(asked))
    assert [len(block) for block in short] == [9]
    assert (short[0] - next(made.generate(options(21)))).abs().max() < 1e-5


def test_4_poses_align_with_latents() -> None:
    """81 frames + 3 give 21 latents; latent j sees frames 4 j - 10 to 4 j + 4 and no other."""
    assert latents_of(81) == (81 + 3) // 4 == 21
    with torch.no_grad():
        embedder = PoseEmbedder()
        poses = torch.randint(0, 256, (1, 3, 33, 32, 32), generator=torch.Generator().manual_seed(0)).float()
        whole = embedder.frames(poses)
        assert whole.shape == (1, 5120, 9, 2, 2)
        for frame in (0, 13, 22):
            other = poses.clone()
            other[:, :, frame] = 255 - other[:, :, frame]
            moved = (embedder.frames(other) - whole).abs().amax(dim=(0, 1, 3, 4)) > 0
            for latent in range(9):
                assert not moved[latent] or 4 * latent - 10 <= frame <= 4 * latent + 4
            assert moved.any()


def test_5_pose_weights_load_with_the_first_poses(wan_volume: Path) -> None:
    told = Told()
    made = nano.load(wan_volume, told=told)
    clip(made, options(9))
    assert "pose.ckpt" not in told.loaded
    poses = torch.full((9, 3, *SIZE), 128, dtype=torch.uint8)
    for _ in range(2):
        clip(made, options(9), Guide(poses=poses))
    assert told.loaded.count("pose.ckpt") == 1


# ------------------------------------------------------------------ on a card


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA CARD HERE: loading is not tested")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.5)])
def test_6_loading(dtype: str, bound: float, wan_volume: Path) -> None:
    """Everything goes to the card in its type, T5 leaves it and comes back, poses load there, and the frames
    are the CPU's; in 16 bits roughly, as four steps feed on each other."""
    spot = place("cuda", dtype)
    made = load_generator("nano", nano.sources(wan_volume), Loading(spot, 2, Told(), eager=True))
    model = made._transformer
    assert model is not None and model.device.type == "cuda" and model.dtype == spot.dtype
    assert made._vae_dtype == spot.conv_dtype and made.text.nbytes > 0
    guide = Guide(poses=torch.full((9, 3, *SIZE), 128, dtype=torch.uint8))
    here = clip(nano.load(wan_volume), options(9), guide)
    for _ in range(2):
        there = clip(made, options(9), guide).float().cpu()
        assert (there - here).norm() / here.norm() < bound
        made.text.offload()
        assert made.text.nbytes == 0
    other = clip(made, options(9, section="generator"), guide).float().cpu()
    assert other.isfinite().all() and (other - here).abs().max() > 1e-3


# ------------------------------------------------------------------ with real weights


@pytest.mark.gpu
@pytest.mark.weights
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(missing()), reason=missing() or "it can run")
@pytest.mark.parametrize(("frames", "use_ema"), [(81, "true"), (81, "false"), (129, "true")])
def test_7_full_validation(frames: int, use_ema: str, tmp_path: Path) -> None:
    """The published model makes a picture that moves, not noise: neighbouring pixels and neighbouring frames
    are alike, and the first and the last frame are not the same."""
    output = tmp_path / "a.mp4"
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", "generate", "--model", MODEL]
    command += ["--frames", str(frames), "--use-ema", use_ema, "-o", str(output)]
    prompt = "A golden retriever runs along a beach at sunset, waves behind it, the camera follows it."
    done = subprocess.run([*command, prompt], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    seconds = result["seconds"]["transformer"] + result["seconds"]["decode"]
    print(f"{frames} frames, EMA {use_ema}: first after {result['first_frames_seconds']} s, "
          f"{frames / seconds:.1f} frames/s")  # fmt: skip
    pictures = torch.stack([torch.from_numpy(frame) for frame in read_frames(output, probe(output))]).float()
    assert len(pictures) == frames
    spread = pictures.std()
    assert spread > 20
    assert (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().mean() < spread / 4  # noise: about 1.1 spreads
    assert (pictures[1:] - pictures[:-1]).abs().mean() < spread / 4
    assert (pictures[0] - pictures[-1]).abs().mean() > 1
