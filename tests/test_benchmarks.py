"""Every benchmark runs at its smallest setting, and every table of the docs names its command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "benchmarks.md"
QUICK = {  # script -> options, and what its tables must hold
    "loading": (["--quick"], ["seedpod", "torch.load mmap, copied", "load_file, assigned", "bfloat16"]),
    "boot": (["--quick"], ["check", "serve, until ready", "import torch, alone", "load nano-wan"]),
    "models": (["--quick"], ["SeedVR2 DiT", "Wan VAE decode", "UMT5", "float32", "load "]),
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
    shared = {"__init__", "__main__", "machine", "measure", "cases"}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared == set(QUICK)


def test_every_table_of_the_docs_names_its_command() -> None:
    sections = re.split(r"^## ", DOC.read_text(), flags=re.MULTILINE)[1:]
    tables = [section for section in sections if re.search(r"^\|", section, re.MULTILINE)]
    assert tables
    for section in tables:
        commands = re.findall(r"python -m benchmarks\.(\w+)", section)
        assert commands and set(commands) <= set(QUICK), section.splitlines()[0]
        assert re.search(r"load \d", section), section.splitlines()[0]
