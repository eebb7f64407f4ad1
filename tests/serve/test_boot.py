from __future__ import annotations

import threading
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.progress import Silent
from app.serve.boot import Boot
from app.settings import load_settings


@pytest.mark.parametrize("ends", ["ready", "failed"])
def test_what_telling_memory_imports_comes_when_the_boot_is_over(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readiness does not wait for it, and a boot that failed has no jobs that need it."""
    states: list[str] = []
    done = threading.Event()

    def chain(boot: Boot) -> None:
        if ends == "failed":
            raise ConfigError("model_unknown", "it is not there")

    def imported(boot: Boot) -> None:
        states.append(boot.state)
        done.set()

    monkeypatch.setattr(Boot, "_chain", chain)
    monkeypatch.setattr(Boot, "_import_sizes", imported)
    boot = Boot(load_settings({}), tmp_path, Silent)
    boot._run()
    assert boot.state == ends
    assert done.wait(5 if ends == "ready" else 0.2) == (ends == "ready")
    assert states == ["ready"] * (ends == "ready")
