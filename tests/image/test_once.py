"""`docker run` for one job: who owns what is written, what is seen, and the exit status."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.boot.hub_server import COMMIT, HubServer
from tests.image.conftest import HARDENED, STRANGER, TARGET, Built, give
from tests.image.engine import Engine

AS_STRANGER = ("--user", f"{STRANGER}:{STRANGER}")
RESTORE = ("run", "restore", "in.mp4", "-o", "out.mp4", "--model", "nano", "--scale", "1")


def once(
    engine: Engine, image: Built, *options: str | Path, command: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    return engine.run("run", "--rm", *options, image.name, *command, check=False)


@pytest.fixture
def clip_volume(volume: Path, short_clip: Path) -> Path:
    """A volume with nano and a clip, `in.mp4`."""
    shutil.copy(short_clip, volume / "in.mp4")
    give(volume)
    return volume


def test_restores_into_the_volume_as_its_owner_and_leaves_nothing_else(
    engine: Engine, image: Built, clip_volume: Path
) -> None:
    before = {path.name for path in clip_volume.iterdir()}
    done = once(engine, image, *HARDENED, *AS_STRANGER, "-v", f"{clip_volume}:/workspace", command=RESTORE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 10
    made = clip_volume / "out.mp4"
    assert (made.stat().st_uid, made.stat().st_gid) == (STRANGER, STRANGER)
    # Hashes are remembered on a volume that can be written.
    assert {path.name for path in clip_volume.iterdir()} - before <= {"out.mp4", ".seedpod"}
    assert all(path.stat().st_uid == STRANGER for path in clip_volume.rglob("*"))


def test_nothing_of_a_read_only_volume_is_written(
    engine: Engine, image: Built, clip_volume: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    give(out)
    command = ("run", "restore", "in.mp4", "-o", "/output/out.mp4", "--model", "nano", "--scale", "1")
    mounts = ("-v", f"{clip_volume}:/workspace:ro", "-v", f"{out}:/output")
    done = once(engine, image, *HARDENED, *AS_STRANGER, *mounts, command=command)
    assert done.returncode == 0, done.stderr
    assert (out / "out.mp4").stat().st_uid == STRANGER
    assert {path.name for path in clip_volume.iterdir()} == {"in.mp4", "nano"}


def test_the_images_own_nano_and_clip_need_no_mount(engine: Engine, image: Built) -> None:
    command = ("run", "restore", "/seedpod/examples/clip.mp4", "-o", "/tmp/out.mp4", "--short-side", "16")
    done = once(engine, image, *HARDENED, "-e", "SEEDPOD_ROOTS=/opt/nano", command=command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "nano"


def test_the_packages_of_the_laboratory_are_in_it(engine: Engine, image: Built, tmp_path: Path) -> None:
    """diffusers for Stable Diffusion's VAE, scikit-learn and matplotlib for the report."""
    give(tmp_path)
    command = ("run", "autoencode", "/seedpod/examples/clip.mp4", "-o", "/output/made", "--model", "nano-vae",
               "--frames", "5", "--edits", "noise strength=0.3 seed=7")  # fmt: skip
    done = once(
        engine, image, *HARDENED, *AS_STRANGER, "-e", "SEEDPOD_ROOTS=/opt/nano", "-v", f"{tmp_path}:/output",
        command=command,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"edited.mp4", "report.html", "report.json", "components.png"} <= made


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (("frobnicate",), 64, "usage"),
        (("run", "restore", "none.mp4", "-o", "out.mp4", "--model", "nano"), 65, "input_missing"),
        (("run", "restore", "in.mp4", "-o", "/etc/out.mp4", "--model", "nano"), 74, "output_unwritable"),
        (("check", "seedvr2-3b"), 78, ""),
    ],
)
def test_the_exit_status_is_the_commands(
    engine: Engine, image: Built, clip_volume: Path, command: tuple[str, ...], status: int, said: str
) -> None:
    done = once(engine, image, *HARDENED, *AS_STRANGER, "-v", f"{clip_volume}:/workspace", command=command)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_any_folder_to_write_to_it_says_so(engine: Engine, image: Built, clip_volume: Path) -> None:
    done = once(
        engine,
        image,
        "--read-only",
        *AS_STRANGER,
        "-v",
        f"{clip_volume}:/workspace:ro",
        command=("check", "nano"),
    )
    assert done.returncode == 0, done.stderr  # remembering hashes is a convenience
    done = once(engine, image, "--read-only", "-v", f"{clip_volume}:/workspace:ro", command=())
    assert done.returncode == 74, done.stderr
    assert "SEEDPOD_SCRATCH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_bars_and_gets_its_cursor_back(
    engine: Engine, image: Built, clip_volume: Path
) -> None:
    ours, theirs = pty.openpty()
    running = engine.popen(
        "run", "--rm", "-it", *AS_STRANGER, "-v", f"{clip_volume}:/workspace", image.name, *RESTORE,
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        shown += piece
    assert running.wait(60) == 0
    text = shown.decode(errors="replace")
    assert "\x1b[?25l" in text  # a bar hides the cursor
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "transformer" in text or "restore" in text, text


def test_stopping_a_job_ends_it_at_once_and_leaves_nothing_partial(
    engine: Engine, image: Built, clip_volume: Path
) -> None:
    shutil.copy(image.context / "examples" / "clip.mp4", clip_volume / "in.mp4")
    give(clip_volume)
    command = ("run", "restore", "in.mp4", "-o", "out.mp4", "--model", "nano", "--scale", "4")
    name = engine.run(
        "run", "-d", *HARDENED, *AS_STRANGER, "-v", f"{clip_volume}:/workspace", image.name, *command
    ).stdout.strip()
    try:
        until = time.monotonic() + 60
        while "load" not in engine.run("logs", name).stderr:  # the models are loaded: the job has begun
            assert time.monotonic() < until, engine.run("logs", name).stderr
            time.sleep(0.2)
        began = time.monotonic()
        engine.run("stop", "-t", "30", name)
        assert time.monotonic() - began < 15
        assert engine.run("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip() == "143"
        assert "interrupted (SIGTERM)" in engine.run("logs", name).stderr
        assert {path.name for path in clip_volume.iterdir()} <= {"in.mp4", "nano", ".seedpod"}
    finally:
        engine.run("rm", "-f", name)


# ------------------------------------------------------------------ downloads

PARTS = {
    "dit": "seedvr2_ema_nano.pth",
    "vae": "ema_vae.pth",
    "positive": "pos_emb.pt",
    "negative": "neg_emb.pt",
}


def hub_manifest(volume: Path) -> tuple[str, dict[str, bytes]]:
    """A manifest of a model on the hub, `hub-nano`, and the files that the hub has."""
    files = {name: (volume / "nano" / "seedvr2" / name).read_bytes() for name in PARTS.values()}
    text = ""
    for name, data in files.items():
        text += (
            f'[file."hub/{name}"]\npath = "hub/{name}"\nformat = "torch"\nsize = {len(data)}\n'
            f'sha256 = "{hashlib.sha256(data).hexdigest()}"\nrepo = "owner/model"\nrevision = "{COMMIT}"\n'
            f'filename = "{name}"\nstage = {str(name.startswith("seedvr2")).lower()}\n'
        )
    text += (
        '[model.hub-nano]\ntask = "restore"\nfamily = "seedvr2"\nvariant = "nano"\n[model.hub-nano.parts]\n'
    )
    return text + "".join(f'{part} = "hub/{name}"\n' for part, name in PARTS.items()), files


def test_fetches_into_the_volume_as_its_owner(
    engine: Engine, image: Built, volume: Path, tmp_path: Path
) -> None:
    manifest, files = hub_manifest(volume)
    (volume / "models.toml").write_text(manifest)
    give(volume)
    with HubServer(files=files) as hub:
        options = (
            *HARDENED, *AS_STRANGER, "--network", "host", "-v", f"{volume}:/workspace",
            "-e", f"HF_ENDPOINT={hub.endpoint}", "-e", "SEEDPOD_MANIFEST=/workspace/models.toml",
        )  # fmt: skip
        done = once(engine, image, *options, command=("fetch", "hub-nano"))
        assert done.returncode == 0, done.stderr
        again = once(engine, image, *options, command=("fetch", "hub-nano"))
    assert again.stdout.strip() == "Nothing is missing."
    for name, data in files.items():
        assert (volume / "hub" / name).read_bytes() == data
        assert (volume / "hub" / name).stat().st_uid == STRANGER
    assert once(engine, image, *options, command=("check", "hub-nano")).returncode == 0


def test_models_are_baked_in_and_the_token_is_not(
    engine: Engine, image: Built, volume: Path, tmp_path: Path
) -> None:
    manifest, files = hub_manifest(volume)
    context = tmp_path / "context"
    shutil.copytree(image.context, context)
    with (context / "models.toml").open("a") as extended:
        extended.write("\n" + manifest)
    secret = tmp_path / "token"
    secret.write_text("hf_very_secret")
    bridge = engine.run(
        "network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "bridge"
    ).stdout.strip()
    with HubServer(files=files, token="hf_very_secret", address=bridge, cdn=bridge) as hub:
        engine.run(
            "build", "--target", "baked", "-t", "seedpod:baked", *image.arguments,
            "--build-arg", f"BAKE_ON=runtime-{TARGET}", "--build-arg", "MODELS=hub-nano",
            "--build-arg", f"HF_ENDPOINT={hub.endpoint}", "--secret", f"id=hf_token,src={secret}", context,
            timeout=600,
        )  # fmt: skip
    done = engine.run(
        "run", "--rm", "--read-only", "--tmpfs", "/tmp", "seedpod:baked", "check", "hub-nano", "--full"
    )
    assert "Nothing wrong" in done.stdout
    told = (
        engine.run("image", "inspect", "seedpod:baked").stdout
        + engine.run("history", "--no-trunc", "seedpod:baked").stdout
    )
    assert "hf_very_secret" not in told
    search = "grep -rl hf_very_secret /opt/models /cache /root /tmp /etc /run 2>/dev/null; true"
    found = engine.run("run", "--rm", "--user", "0", "--entrypoint", "sh", "seedpod:baked", "-c", search)
    assert found.stdout == ""
