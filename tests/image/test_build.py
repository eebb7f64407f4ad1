"""What is in the image, how large it is, and how soon a change is in it."""

from __future__ import annotations

import json
import time

from app import __version__
from tests.image.conftest import STRANGER, TARGET, Built
from tests.image.engine import Engine

# Megabytes: torch 574, with CUDA 4370; other packages 942, with CUDA 975; nano 50, code 13, and some room.
ADDED_BYTES = {"cpu": 1_650_000_000, "gpu": 5_550_000_000}


def inside(engine: Engine, image: Built, script: str, *options: str) -> str:
    return engine.run("run", "--rm", *options, "--entrypoint", "sh", image.name, "-c", script).stdout


def test_the_image_is_small_and_made_of_layers_that_rarely_change(engine: Engine, image: Built) -> None:
    size = int(engine.run("image", "inspect", "-f", "{{.Size}}", image.name).stdout)
    layers = engine.run("history", "--format", "{{.Size}}\t{{.CreatedBy}}", image.name).stdout
    print(
        f"\nbuilt in {image.seconds:.0f} s; {size:,} bytes, {image.base_bytes:,} of them the base\n{layers}"
    )
    assert size - image.base_bytes < ADDED_BYTES[TARGET]
    order = [layers.index(what) for what in ("/seedpod", "/opt/nano", "/opt/venv", "/opt/torch")]
    assert order == sorted(order)  # history shows the last layer first


def test_nothing_is_left_of_building_it(engine: Engine, image: Built) -> None:
    found = inside(
        engine, image,
        "for tool in gcc cc c++ make pip pip3 curl git; do command -v $tool; done;"
        "ls /var/lib/apt/lists /var/cache/apt; ls -A /root; ls /opt/wheels /etc/pip.conf 2>/dev/null;"
        "find / -xdev -name 'pip' -path '*/.cache/*'; ls -A /cache; ls -A /tmp",
        "--user", "0",
    )  # fmt: skip
    assert set(found.split()) <= {
        "/var/lib/apt/lists:",
        "/var/cache/apt:",
        ".bashrc",
        ".profile",
        "archives",
    }, found


def test_it_holds_the_program_and_nothing_else_of_the_checkout(engine: Engine, image: Built) -> None:
    (image.context / ".env").write_text("HF_TOKEN=hf_secret\n")
    (image.context / "weights.safetensors").write_text("large")
    engine.run(
        "build", "--target", TARGET, "-t", "seedpod:again", *image.arguments, image.context, timeout=600
    )
    script = "ls -A /seedpod; find / -xdev \\( -name .env -o -name weights.safetensors \\) 2>/dev/null; true"
    found = engine.run("run", "--rm", "--entrypoint", "sh", "seedpod:again", "-c", script).stdout.split()
    assert {"entrypoint.py", "app", "models.toml"} <= set(found)
    assert not set(found) & {"tests", "docs", ".git", ".env", "/seedpod/.env", "/seedpod/weights.safetensors"}


def test_the_users_process_is_told_how_to_run_and_stop(engine: Engine, image: Built) -> None:
    config = json.loads(engine.run("image", "inspect", "-f", "{{json .Config}}", image.name).stdout)
    assert config["User"] == "1000:1000"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"][0] == "/usr/bin/tini"
    assert config["Entrypoint"][-1] == "/seedpod/entrypoint.py"
    assert config["Healthcheck"]["Test"][-1] == "/seedpod/tools/ping.py"
    assert config["Labels"]["org.opencontainers.image.title"] == "Seedpod"
    assert "TOKEN" not in str(config["Env"])
    assert engine.run("run", "--rm", image.name, "--version").stdout.strip() == __version__


def test_any_user_may_run_it_without_any_capability(engine: Engine, image: Built) -> None:
    script = (
        "id -u; whoami; grep -E 'CapEff|CapPrm|NoNewPrivs' /proc/self/status; touch /cache/x && echo cache"
    )
    hard = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    assert inside(engine, image, script, *hard).split() == [
        "1000", "seedpod", "CapPrm:", "0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1", "cache",
    ]  # fmt: skip
    stranger = inside(
        engine, image, f"{script} 2>/dev/null", *hard, "--user", f"{STRANGER}:{STRANGER}"
    ).split()
    assert stranger[0] == str(STRANGER)
    assert stranger[-1] == "cache"
    for path in ("/seedpod/x", "/opt/venv/x", "/opt/nano/x", "/etc/x"):
        assert "Permission denied" in inside(engine, image, f"touch {path} 2>&1; true")


def test_a_change_of_the_code_is_in_the_image_in_seconds(engine: Engine, image: Built) -> None:
    def layers() -> list[str]:
        return json.loads(engine.run("image", "inspect", "-f", "{{json .RootFS.Layers}}", image.name).stdout)

    before = layers()
    source = image.context / "app" / "__init__.py"
    text = source.read_text()
    try:
        source.write_text(text + "\nCHANGED = True\n")
        began = time.monotonic()
        engine.run(
            "build", "--target", TARGET, "-t", "seedpod:changed", *image.arguments, image.context, timeout=600
        )
        seconds = time.monotonic() - began
    finally:
        source.write_text(text)
    print(f"\nrebuilt in {seconds:.1f} s")
    after = json.loads(
        engine.run("image", "inspect", "-f", "{{json .RootFS.Layers}}", "seedpod:changed").stdout
    )
    assert after[:-1] == before[:-1]  # nano's weights are the same bytes: only the code's layer is new
    assert after[-1] != before[-1]
    assert seconds < 60
