"""The boot chain over several models: each is ready as early as it can be, and gives back what was staged."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from app import chain
from app.boot import stage as stage_module
from app.boot.manifest import read_manifest
from app.boot.verify import select_models
from app.chain import Loaded
from app.errors import ConfigError
from app.progress import Silent
from app.settings import load_settings
from tests.boot.places import Machine

REST = 'vae = "nano/ema_vae.pth", positive = "nano/pos_emb.pt", negative = "nano/neg_emb.pt"'
MORE = f"""
[file."second.pth"]
path = "nano/seedvr2/second.pth"
format = "torch"
stage = true
[model.second]
task = "restore"
family = "seedvr2"
variant = "nano"
parts = {{dit = "second.pth", {REST}}}
[model.third]
task = "restore"
family = "seedvr2"
variant = "nano"
parts = {{dit = "second.pth", {REST}}}
"""
Boot = Callable[..., Generator[Loaded]]


@pytest.fixture
def machine(tmp_path: Path, nano_volume: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A volume with three models, of which the last two share their file, and fast places to stage to."""
    machine = Machine(tmp_path)
    shutil.copytree(nano_volume, machine.volume, dirs_exist_ok=True)
    shutil.copy(
        machine.volume / "nano/seedvr2/seedvr2_ema_nano.pth", machine.volume / "nano/seedvr2/second.pth"
    )
    monkeypatch.setattr(stage_module, "default_places", lambda: machine.places())
    return machine


@pytest.fixture
def boot(machine: Machine, tmp_path: Path) -> Boot:
    def run(more: str = MORE, models: str = "nano,second,third", **settings: str) -> Generator[Loaded]:
        own = tmp_path / "own.toml"
        own.write_text(more)
        environment = {
            "SEEDPOD_ROOTS": str(machine.volume),
            "SEEDPOD_MANIFEST": str(own),
            "SEEDPOD_MODELS": models,
            "SEEDPOD_CACHE": str(tmp_path / "cache"),
        }
        chosen = load_settings(environment | settings)
        manifest = read_manifest(chosen.manifest)
        selection = select_models(manifest, chosen.models, chosen.roots)
        return chain.load_staged(chosen, manifest, selection, chain.hash_record(chosen), Silent(), Silent())

    return run


def copies(machine: Machine) -> list[str]:
    """The staged copies that are there, by the name of their file."""
    return sorted(path.name.split("-")[-1] for path in machine.shm.rglob("*.pth") if path.is_file())


def test_the_next_model_is_staged_while_one_loads(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    staged_second, real = threading.Event(), stage_module.stage

    def stage(source: Path, **options: Any) -> stage_module.Staged:
        made = real(source, **options)
        if source.name == "second.pth":
            staged_second.set()
        return made

    def load(model: Any, *rest: Any) -> str:
        assert model.name != "nano" or staged_second.wait(20), "nothing was staged while nano loaded"
        return str(model.name)

    monkeypatch.setattr(stage_module, "stage", stage)
    monkeypatch.setattr(chain, "load_model", load)
    assert [loaded.pipeline for loaded in boot()] == ["nano", "second", "third"]


def test_copies_are_given_back_when_nobody_needs_them_any_more(
    boot: Boot, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "load_model", lambda model, files, *rest: files["dit"].path)
    held = {loaded.name: (loaded.pipeline, copies(machine)) for loaded in boot()}
    assert held["nano"][0].is_relative_to(machine.shm)
    assert "seedvr2_ema_nano.pth" not in held["nano"][1]
    assert held["second"][1] == ["second.pth"]  # staged once, for both
    assert held["second"][0] == held["third"][0]
    assert copies(machine) == []


def test_copies_stay_where_the_settings_keep_them(
    boot: Boot, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "load_model", lambda *rest: None)
    assert len(list(boot(SEEDPOD_KEEP_STAGED="true"))) == 3
    assert copies(machine) == ["second.pth", "seedvr2_ema_nano.pth"]


def test_a_wrong_file_of_the_second_model_ends_the_boot_after_the_first(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "load_model", lambda *rest: None)
    booting = boot(MORE.replace("stage = true", f'stage = true\nsha256 = "{"0" * 64}"'))
    assert next(booting).name == "nano"
    with pytest.raises(ConfigError, match=r"second\.pth has SHA-256"):
        next(booting)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


def test_a_compiler_that_is_not_there_ends_the_boot(boot: Boot, tmp_path: Path) -> None:
    import torch._dynamo
    from torch._inductor import config

    torch._dynamo.reset()  # nothing is compiled by now
    asked = {"SEEDPOD_COMPILE": "on", "SEEDPOD_CACHE": str(tmp_path / "cache"), "SEEDPOD_STAGE": "off"}
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"g\+\+, failed on cpu: .*no-such-compiler.*=off\.$") as told,
    ):
        list(boot("", "nano", **asked))
    assert told.value.code == "compiler_unusable"
    assert "\n" not in told.value.message


def test_float8_is_for_transformers(
    boot: Boot, latents_volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model without one is refused alone; beside one that has, it is loaded as ever."""
    root = {"SEEDPOD_ROOTS": str(latents_volume), "SEEDPOD_DTYPE": "float8", "SEEDPOD_STAGE": "off"}
    with pytest.raises(
        ConfigError, match=r"transformers in 8 bits, and autoencoders \(nano-wan-vae\)"
    ) as told:
        boot("", "nano-wan-vae", **root)
    assert told.value.code == "float8_unavailable"
    with caplog.at_level("INFO"):
        loaded = {each.name: each.pipeline for each in boot("", "nano,nano-wan-vae", **root)}
    assert loaded["nano"].float8 == "widened"
    assert next(loaded["nano-wan-vae"].module.parameters()).dtype == torch.float32
    assert [line for line in caplog.messages if "float8" in line] == [
        "nano: matrices in float8, widened to 16 bits for each product"
    ]
