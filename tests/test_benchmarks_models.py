"""What the benchmark of the models' passes keeps beside its table, and what it compares with."""

from pathlib import Path

import pytest
import torch

from benchmarks import cases, models


def test_a_profile_keeps_the_tables_of_all_sizes_and_the_machine(tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    texts = [f"{size}\n{models.profile_of(lambda: x @ x, 'cpu')}" for size in ("small", "large")]
    models.keep_profile(tmp_path / "new", "A pass, float32", texts)
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "a-pass-float32.txt"
    text = path.read_text()
    assert text.startswith("A pass, float32\n\nsmall\n---")
    assert "\nlarge\n---" in text
    assert text.count("aten::mm") == 2
    assert text.splitlines()[-1].partition("; load")[1]
    assert not any(line.endswith(" ") for line in text.splitlines())


@pytest.mark.parametrize(
    ("slow", "device", "dtype", "theirs", "named"),
    [
        (True, "cpu", torch.bfloat16, torch.float32, "diffusers, float32"),
        (True, "cuda", torch.bfloat16, torch.bfloat16, "diffusers"),
        (False, "cpu", torch.bfloat16, torch.bfloat16, "diffusers"),
        (False, "cpu", torch.float32, torch.float32, "diffusers"),
    ],
)
def test_a_library_computes_in_float32_where_16_bits_are_slow(
    slow: bool, device: str, dtype: torch.dtype, theirs: torch.dtype, named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cases, "slow_in", lambda dtype: slow)
    assert cases.peers(dtype, device) == theirs
    assert models.named("diffusers", dtype, device) == named
    assert models.named("no cache", dtype, device) == "no cache"
