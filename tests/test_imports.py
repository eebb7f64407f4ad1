"""What each command must not import: what it does not use, every start of it would pay for.

The commands are those whose imports `python -m benchmarks.boot` prints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.boot import IMPORT, Environ, commands, prepare, run

# Of the server, the platform, the bucket, the hub; and what codecs or their report take.
SERVER = {"fastapi", "starlette", "uvicorn", "prometheus_client", "runpod", "aiohttp", "app.serve"}
REMOTE = {"boto3", "botocore", "huggingface_hub", "requests"}
LARGE = {"transformers", "diffusers", "sklearn", "scipy", "matplotlib", "torchvision", "imageio"}
# A second, which jobs need to tell their memory, and nothing else: not a server before it is ready.
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
TORCH = {"torch", "numpy", "PIL", "einops", "safetensors", "imageio_ffmpeg", "tokenizers", "app.device"}
JOBS = {"app.job", "app.video", "app.models.latents"}
DIT, TRANSFORMER, CODECS = "app.models.seedvr2.dit", "app.models.wan.transformer", "app.models.latents.codec"
NEVER = {
    "check": SERVER | REMOTE | LARGE | TORCH | JOBS,
    "stage": SERVER | REMOTE | LARGE | TORCH | JOBS,
    "run restore": SERVER | REMOTE | LARGE | {"tokenizers", TRANSFORMER, CODECS},
    "run generate": SERVER | REMOTE | LARGE | {"PIL", DIT, CODECS, "app.video.shots"},
    "run autoencode": SERVER | REMOTE | {"transformers", "diffusers", "tokenizers", DIT, TRANSFORMER},
    "serve, until ready": REMOTE
    | LARGE
    | COMPILER
    | {"runpod", "aiohttp", "PIL", "tokenizers", TRANSFORMER, CODECS, "app.job.generate", "app.job.clips"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(scope="module")
def environ(folder: Path) -> Environ:
    """One model, so that what the others need is not."""
    return prepare(folder) | {"SEEDPOD_MODELS": "nano"}


def imported(arguments: list[str], environ: Environ) -> set[str]:
    """The modules that a command imports, and the packages that they are in."""
    told = run(arguments, environ, "-X", "importtime").told
    names = {name for _, name in IMPORT.findall(told.partition("boot: ready")[0])}
    whole = (name.split(".") for name in names)
    return {".".join(parts[:end]) for parts in whole for end in range(1, len(parts) + 1)}


@pytest.mark.parametrize("path", NEVER)
def test_nothing_that_a_command_does_not_use(path: str, folder: Path, environ: Environ) -> None:
    found = imported(commands(folder, quick=False)[path], environ)
    assert "app.settings" in found
    assert sorted(NEVER[path] & found) == []


def test_every_path_is_looked_at(folder: Path) -> None:
    assert set(commands(folder, quick=False)) == set(NEVER)
