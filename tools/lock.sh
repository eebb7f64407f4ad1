#!/bin/sh
# Write requirements/*.txt again from pyproject.toml: every version with the hashes of all its files, for any
# machine. Versions that are there already stay, as far as pyproject.toml lets them; `--upgrade` takes the newest.
# Needs uv (`pip install uv`). PyPI holds torch with CUDA; for another torch, write its version into torch.txt and
# torch-cpu.txt, and the hash of its CPU build into the latter, first.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lock() {  # lock OUTPUT INPUT...
    output=$1
    shift
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --no-emit-index-url --fork-strategy fewest "$@" --output-file "$output"
}
torch=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt)
cat requirements/run.txt requirements/latents.txt requirements/dev.txt requirements/torch-deps.txt > "$work/all.txt"
echo "torch==$torch" > "$work/torch.in"
lock "$work/all.txt" pyproject.toml "$work/torch.in" --extra dev "$@"
# What each file holds: torch, what it needs, what the program needs besides, what its extra does, what its tests do.
grep -v '^ ' "$work/all.txt" | sed 's/ *\\$//' > "$work/pins.txt"
lock "$work/torch.txt" "$work/torch.in" --constraint "$work/pins.txt"
lock "$work/run.txt" pyproject.toml --constraint "$work/pins.txt"
lock "$work/latents.txt" pyproject.toml --extra latents --constraint "$work/pins.txt"
python3 - "$work" <<'PYTHON'
import re, sys
from pathlib import Path

work, kept = Path(sys.argv[1]), Path("requirements")


def blocks(path):
    found = re.findall(r"(?m)^\S+==.*(?:\n +--hash.*)+", path.read_text())
    named = {re.split(r"==", block)[0]: block for block in found}
    assert len(named) == len(found), f"a package is in {path.name} in two versions"
    return named


needs, run, latents, everything = (
    blocks(work / name) for name in ("torch.txt", "run.txt", "latents.txt", "all.txt")
)
only_torch = {name for name in run if re.match("torch$|nvidia-|cuda-|triton$", name)}
cpu = re.search(r"--hash=\S+", (kept / "torch-cpu.txt").read_text())[0]


def write(name, chosen):
    (kept / name).write_text("\n".join(chosen) + "\n")


write("torch.txt", [f"{needs['torch']} \\\n    {cpu}"])
write("torch-deps.txt", [block for name, block in needs.items() if name != "torch"])
write("run.txt", [block for name, block in run.items() if name not in only_torch])
write("latents.txt", [block for name, block in latents.items() if name not in run])
write("dev.txt", [block for name, block in everything.items() if name not in latents])
PYTHON
