"""Every benchmark runs at its smallest setting, and every figure of the docs lies behind its command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import scripts
from tools import page

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "benchmarks.md"
QUICK = {  # script -> options, and what its tables must hold
    "loading": (["--quick"], ["seedpod", "torch.load mmap, copied", "load_file, assigned", "bfloat16"]),
    "boot": (["--quick"], ["check", "serve, until ready", "import torch, alone", "load nano-wan"]),
    "gpu": (["--device", "cpu", "--sizes", "tiny", "--only", "restore"], ["Matrix product", "nano 30p"]),
    "growth": (
        ["--quick", "--only", "restore"],
        ["restore, memory (MB)", "attention within", "jobs at once"],
    ),
    "memory": (["--quick"], ["predicted, MB", "nano, an image", "3b 720p, longer", "24 GiB"]),
    "models": (["--quick"], ["SeedVR2 DiT", "Wan VAE decode", "UMT5", "float32", "load "]),
    "sharing": ([], ["largest share", "7B, 1080p, 31 latents", "load "]),
    "staging": (["--quick"], ["cp then sha256sum", "staged, 16 readers", "cold"]),
    "text_encoder": (["--quick"], ["tokenizer", "ready", "ratio"]),
}


@pytest.mark.parametrize("script", QUICK)
def test_runs(script: str, tmp_path: Path) -> None:
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed: no peer to compare with")
    options, held = QUICK[script]
    if script in ("loading", "staging"):
        options = [*options, "--folder", str(tmp_path)]
    command = [sys.executable, "-m", f"benchmarks.{script}", *options]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [text for text in held if text not in ran.stdout] == []
    assert list(tmp_path.iterdir()) == []


def test_every_script_is_tried_here() -> None:
    assert set(scripts()) == set(QUICK)


def test_every_figure_of_the_docs_lies_behind_its_command() -> None:
    text = DOC.read_text()
    sections = list(page.MARKS.finditer(text))
    assert {page.script(found["command"]) for found in sections} <= set(QUICK)
    for found in sections:
        assert f"`{found['command']}`" in found[0]
        assert "\n| " not in found[0] or re.search(r"load \d", found[0]), found["command"]
    prose = page.MARKS.sub("", text)
    assert not re.search(r"^\|", prose, re.MULTILINE)
    assert "<!--" not in prose
