"""Every golden file through `python -m tests.golden`, and that it can fail."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.golden import FILES, LIMIT, evaluate, main


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_originals_numbers(path: Path) -> None:
    errors = evaluate(path)
    assert errors
    assert max(errors.values()) < LIMIT, errors


def test_a_wrong_number_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = next(path for path in FILES if path.stem == "seedvr2_pixels")
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata()
    tensors["wavelet"] = tensors["wavelet"] + 2e-4 * torch.randn_like(tensors["wavelet"])
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors, wrong, metadata)
    assert main([wrong]) == 1
    assert main([source]) == 0
    shown = capsys.readouterr().out
    assert shown.count("WRONG") == 1
