"""Checkpoints into float8, and out of files that hold float8 themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app.boot import tensorread
from app.boot.checkpoint import load, load_tensor
from app.errors import ConfigError
from app.nn.float8 import FLOAT8, keep_in_float8, quantised
from app.nn.linear import Linear


class Net(nn.Module):
    """Blocks whose matrices may lie in 8 bits, and what never does."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = Linear(64, 48)
        self.blocks = nn.ModuleList(nn.Sequential(Linear(48, 96), nn.LayerNorm(96)) for _ in range(2))


def eight() -> Net:
    net = Net()
    keep_in_float8(net.blocks, "widened")
    return net


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.to(dtype) for name, tensor in Net().state_dict().items()}


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize(
    "stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
@pytest.mark.parametrize("block", [100, 1000, 8 << 20])
def test_matrices_are_made_while_they_are_read(
    tmp_path: Path, stored: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, however the file is cut into blocks: one smaller than a row, some rows, all of it."""
    monkeypatch.setattr(tensorread, "BLOCK", block)
    tensors = state(stored)
    matrix = tensors["blocks.1.0.weight"]
    tensors["blocks.1.0.weight"] = matrix.t().contiguous().t()  # columns first
    net = load(eight, saved(tmp_path / "net.pth", tensors), "torch", dtype=torch.bfloat16, readers=3)
    for name in ("0", "1"):
        layer = net.blocks[int(name)][0]
        source = tensors[f"blocks.{name}.0.weight"]
        values, scale = quantised(source if stored == torch.bfloat16 else source.float())
        assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(layer.scale, scale)
        assert not layer.weight.requires_grad
    others = {name: tensor for name, tensor in net.state_dict().items() if tensor.dtype != FLOAT8}
    assert set(others) == set(tensors) - {"blocks.0.0.weight", "blocks.1.0.weight"}
    for name, tensor in others.items():
        assert torch.equal(tensor, tensors[name].to(torch.bfloat16)), name


def test_a_file_in_float8_is_kept_as_it_is(tmp_path: Path) -> None:
    """Casts without scales, as some publish them: the same values, widened or not."""
    save_file(state(FLOAT8), tmp_path / "net.safetensors")
    wide = load(Net, tmp_path / "net.safetensors", "safetensors", dtype=torch.bfloat16)
    net = load(eight, tmp_path / "net.safetensors", "safetensors", dtype=torch.bfloat16)
    for block, other in zip(net.blocks, wide.blocks, strict=True):
        assert torch.equal(block[0].weight.bfloat16() * block[0].scale.bfloat16(), other[0].weight)
    x = torch.randn(5, 48).bfloat16()
    assert torch.equal(net.blocks[0](x), wide.blocks[0](x))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_where_no_type_is_asked_for_8_bits_are_widened(tmp_path: Path, stored: torch.dtype) -> None:
    """Nothing computes in them."""
    tensors = state(stored)
    net = load(Net, saved(tmp_path / "net.pth", tensors), "torch")
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, tensors[name].bfloat16()), name
    prompt = {"positive": torch.randn(5, 8).to(stored)}
    save_file(prompt, tmp_path / "prompt.safetensors")
    assert torch.equal(
        load_tensor(tmp_path / "prompt.safetensors", "safetensors"), prompt["positive"].bfloat16()
    )


def test_what_is_no_number_stays_none(tmp_path: Path) -> None:
    tensors = state(FLOAT8)
    tensors["enter.weight"] = tensors["enter.weight"].float()
    tensors["enter.weight"][3, 4] = torch.nan
    tensors["enter.weight"] = tensors["enter.weight"].to(FLOAT8)
    tensors["blocks.0.0.weight"] = tensors["enter.weight"].float()[:, :48].repeat(2, 1)
    path = saved(tmp_path / "net.pth", tensors)
    for dtype in (torch.bfloat16, torch.float16):
        net = load(eight, path, "torch", dtype=dtype)
        assert net.enter.weight[3, 4].isnan() and net.enter.weight.isnan().sum() == 1
        assert net.blocks[0][0].weight[3, 4].isnan()
        assert net.blocks[0][0].weight.float()[[0, 1, 2, 4]].isfinite().all()


class Turning(nn.Module):
    """A buffer that the module computes, as rope's frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.register_buffer("freqs", torch.logspace(2, -4, 21))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_stored_frequencies_may_be_rounded_to_8_bits(tmp_path: Path, stored: torch.dtype) -> None:
    own = Turning().freqs
    path = saved(tmp_path / "net.pth", {"freqs": own.to(stored)})
    net = load(Turning, path, "torch", dtype=torch.bfloat16, recompute=("freqs",))
    assert torch.equal(net.freqs, own), "the computed value, not the rounded one"
    path = saved(tmp_path / "net.pth", {"freqs": (own * 1.3).to(stored)})
    with pytest.raises(ConfigError, match=r"freqs differs from what the model computes"):
        load(Turning, path, "torch", dtype=torch.bfloat16, recompute=("freqs",))


MEASURE = """
import json, sys, torch
from pathlib import Path
from torch import nn
from app.boot.checkpoint import load
from app.nn.float8 import keep_in_float8
from app.nn.linear import Linear

def peak():  # not getrusage: a child begins with its parent's maximum
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def build():
    model = nn.Sequential(*(Linear(2048, 2048, bias=False) for _ in range(12)))
    keep_in_float8(model, "widened")
    return model

torch.ones(1 << 16).to(torch.bfloat16).sum()
before = peak()
model = load(build, Path(sys.argv[1]), "torch", dtype=torch.bfloat16, readers=2)
size = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
print(json.dumps([peak() - before, size]))
"""


def test_no_wider_model_lies_beside_the_8_bits(tmp_path: Path) -> None:
    """50 MB made of 201 MB: what is read at a time comes on top, two readers' blocks of 8 MiB."""
    path = tmp_path / "big.pth"
    torch.save({f"{i}.weight": torch.rand(2048, 2048) for i in range(12)}, path)
    run = [sys.executable, "-c", MEASURE, str(path)]
    peak, size = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    print(f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB, {peak / size:.2f}")
    assert size == 12 * (2048 * 2048 + 4 * 2048)
    assert 0.9 * size < peak < 2 * size, "in 16 bits beside it, it would be three times"
