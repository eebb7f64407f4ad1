"""`load` gives what torch.load and load_state_dict give, bit for bit, and refuses what does not fit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from app.boot import tensorread
from app.boot.checkpoint import give_back, load, load_tensor
from app.errors import ConfigError, FileError
from app.progress import Lines


class Rope(nn.Module):
    """A module whose buffer is computed, kept in checkpoints as published."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.persistent = persistent
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.register_buffer("freqs", torch.logspace(0, -4, 21), persistent=self.persistent)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * width)
        self.norm = nn.BatchNorm1d(2 * width)
        self.rope = Rope()


class Posed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pose_proj = nn.Linear(4, 4)


def state(width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    net = Net(width)
    nn.init.normal_(net.norm.weight)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def saved(tmp_path: Path, tensors: Any, **options: Any) -> Path:
    path = tmp_path / "net.pth"
    torch.save(tensors, path, **options)
    return path


def plain(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The reference: torch's own loader, strictly."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"), assign=True)
    return model


def assert_equal(found: nn.Module, expected: dict[str, Tensor]) -> None:
    assert list(found.state_dict()) == list(expected)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_load_equals_torch_load(tmp_path: Path, readers: int, zipped: bool) -> None:
    path = saved(tmp_path, state(), _use_new_zipfile_serialization=zipped)
    assert_equal(load(Net, path, "torch", readers=readers), plain(Net, path).state_dict())


def test_load_of_safetensors_equals_load_of_torch(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "net.safetensors")
    assert_equal(load(Net, tmp_path / "net.safetensors", "safetensors"), state())


def test_a_loaded_model_is_ready_for_inference(tmp_path: Path) -> None:
    model = load(Net, saved(tmp_path, state()), "torch")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tensors_larger_than_a_block_and_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorread, "BLOCK", 1000)  # not a divisor of any tensor's size
    tensors = state(64)
    tensors["proj.weight"] = tensors["proj.weight"].t().contiguous().t()  # columns first
    tensors["norm.bias"] = torch.arange(512.0)[1::4]
    tensors["norm.weight"] = tensors["norm.bias"]  # one storage, two names
    path = saved(tmp_path, tensors)
    expected = plain(lambda: Net(64), path).state_dict()
    assert_equal(load(lambda: Net(64), path, "torch"), expected)
    cast = load(lambda: Net(64), path, "torch", dtype=torch.bfloat16).state_dict()
    assert torch.equal(cast["proj.weight"], expected["proj.weight"].bfloat16())
    assert torch.equal(cast["norm.bias"], expected["norm.bias"].bfloat16())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_floats_are_cast_as_torch_casts_and_integers_never(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None
) -> None:
    tensors = {n: t.to(stored) if t.is_floating_point() else t for n, t in state().items()}
    found = load(Net, saved(tmp_path, tensors), "torch", dtype=dtype, recompute=("*.freqs",)).state_dict()
    assert found["norm.num_batches_tracked"].dtype == torch.int64
    assert found["rope.freqs"].dtype == torch.float32, "what the module computes keeps its dtype"
    for name in ("proj.weight", "norm.running_var"):
        assert found[name].dtype == (dtype or stored)
        assert torch.equal(found[name], tensors[name].to(dtype or stored))


def test_a_value_beyond_the_dtype_is_refused_but_infinities_stay(tmp_path: Path) -> None:
    tensors = state()
    tensors["proj.bias"][3] = -1e6
    path = saved(tmp_path, tensors)
    with pytest.raises(
        ConfigError, match=r"tensor proj.bias holds 1e\+06, which is beyond float16"
    ) as caught:
        load(Net, path, "torch", dtype=torch.float16)
    assert caught.value.code == "checkpoint_overflow"
    load(Net, path, "torch", dtype=torch.bfloat16)
    tensors["proj.bias"][3] = -torch.inf
    tensors["proj.bias"][4] = torch.nan
    assert load(Net, saved(tmp_path, tensors), "torch", dtype=torch.float16).proj.bias[3] == -torch.inf


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state().items() if key != name}


MISFITS: list[tuple[str, dict[str, Tensor], str]] = [
    ("missing", without("proj.bias"), "1 tensor missing: proj.bias"),
    ("missing buffer", without("norm.running_var"), "1 tensor missing: norm.running_var"),
    ("left over", state() | {"proj.scale": torch.ones(1)}, "1 tensor left over: proj.scale"),
    ("shape", state() | {"proj.bias": torch.ones(5)}, "proj.bias is 5, expected 16"),
    ("flat", state() | {"proj.weight": torch.ones(128)}, "proj.weight is 128, expected 16x8"),
    ("scalar", state() | {"proj.bias": torch.tensor(1.0)}, "proj.bias is a scalar, expected 16"),
    ("integers", state() | {"proj.bias": torch.ones(16).int()}, "proj.bias is I32, expected float32"),
    ("counter", state() | {"norm.num_batches_tracked": torch.tensor(1.0)}, "is F32, expected int64"),
    ("another width", state(16), "of another shape: proj.weight is 32x16, expected 16x8;"),
]


@pytest.mark.parametrize(("tensors", "says"), [case[1:] for case in MISFITS], ids=[c[0] for c in MISFITS])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    path = saved(tmp_path, tensors)
    with pytest.raises(ConfigError) as caught:
        load(Net, path, "torch")
    assert caught.value.code == "checkpoint_tensors"
    assert caught.value.message.startswith(f"{path} does not fit the model: ")
    assert says in caught.value.message


def test_names_are_mapped_and_dropped_by_name(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in state().items()}
    path = saved(tmp_path, {"step": 9, "generator_ema": tensors | {"extra": torch.ones(1)}})

    def rename(name: str) -> str | None:
        return None if name == "extra" else name.removeprefix("model.")

    assert_equal(load(Net, path, "torch", rename=rename, section="generator_ema"), state())
    with pytest.raises(ConfigError, match=r"missing: .*the file has the sections generator_ema"):
        load(Net, path, "torch", rename=rename)


def test_an_optional_group_is_loaded_or_none(tmp_path: Path) -> None:
    model = load(Posed, saved(tmp_path, state()), "torch", optional=("pose_proj.*",))
    assert model.pose_proj.weight is None
    assert model.pose_proj.bias is None
    pose = {"pose_proj.weight": torch.ones(4, 4), "pose_proj.bias": torch.ones(4)}
    model = load(Posed, saved(tmp_path, state() | pose), "torch", optional=("pose_proj.*",))
    assert torch.equal(model.pose_proj.weight, torch.ones(4, 4))
    with pytest.raises(ConfigError, match=r"missing: pose_proj\.weight, pose_proj\.bias"):
        load(Posed, saved(tmp_path, state()), "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_computed_buffer_admits_rounding_and_nothing_else(tmp_path: Path, dtype: torch.dtype) -> None:
    """The 7B's published 16-bit file keeps its rope frequencies in float16."""
    own = Rope().freqs
    tensors = state() | {"rope.freqs": own.to(dtype)}
    model = load(Net, saved(tmp_path, tensors), "torch", recompute=("*.freqs",))
    assert torch.equal(model.rope.freqs, own), "the computed value, not the rounded one"
    tensors["rope.freqs"] = (own * 1.02).to(dtype)
    with pytest.raises(ConfigError, match=r"rope.freqs differs from what the model computes by up to 0\.0"):
        load(Net, saved(tmp_path, tensors), "torch", recompute=("*.freqs",))


def test_a_computed_buffer_need_not_be_stored(tmp_path: Path) -> None:
    model = load(Net, saved(tmp_path, without("rope.freqs")), "torch", recompute=("*.freqs",))
    assert torch.equal(model.rope.freqs, Rope().freqs)


class Transient(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rope = Rope(persistent=False)


def test_buffers_outside_the_state_are_computed_or_refused(tmp_path: Path) -> None:
    """A non-persistent buffer left on meta gives garbage only when it is used: here it stops the load."""
    path = saved(tmp_path, without("rope.freqs"))
    assert torch.equal(load(Transient, path, "torch").rope.freqs, Rope().freqs)

    class Forgetful(Transient):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(2), persistent=False)

    with pytest.raises(ConfigError, match=r"1 tensor without a value: scale\."):
        load(Forgetful, path, "torch")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_single_tensors_as_prompt_embeddings(tmp_path: Path, zipped: bool, dtype: torch.dtype) -> None:
    tensor = torch.randn(58, 512).to(dtype)
    path = saved(tmp_path, tensor, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_tensor(path, "torch"), torch.load(path, weights_only=True))
    save_file({"positive": tensor}, tmp_path / "p.safetensors")
    assert torch.equal(load_tensor(tmp_path / "p.safetensors", "safetensors"), tensor)
    with pytest.raises(ConfigError, match="holds 8 tensors, expected one"):
        load_tensor(saved(tmp_path, state()), "torch")


KINDS = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SHAPES, KINDS, st.booleans()), min_size=1, max_size=5),
    st.sampled_from([None, torch.bfloat16, torch.float32]),
    st.booleans(),
)
def test_any_state_loads_as_torch_loads_it(
    tmp_path_factory: pytest.TempPathFactory, kinds: Any, dtype: torch.dtype | None, zipped: bool
) -> None:
    tensors = {}
    for number, (shape, kind, turned) in enumerate(kinds):
        tensor = (torch.rand(shape) * 4).to(kind)
        tensors[f"t{number}"] = tensor.movedim(0, -1) if turned and shape else tensor

    def build() -> nn.Module:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype))
        return module

    path = saved(tmp_path_factory.mktemp("any"), tensors, _use_new_zipfile_serialization=zipped)
    expected = plain(build, path).state_dict()
    found = load(build, path, "torch", dtype=dtype, readers=2).state_dict()
    for name, tensor in expected.items():
        want = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert found[name].dtype == want.dtype
        assert torch.equal(found[name], want)


# ------------------------------------------------------------------ reading


def test_progress_counts_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(lambda: Net(256), saved(tmp_path, state(256)), "torch", progress=Lines())
    assert "load net.pth: 534.6 kB in " in capsys.readouterr().err


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, state())

    def shrink() -> nn.Module:
        os.truncate(path, 1500)
        return Net()

    with pytest.raises(FileError, match=r"net\.pth ends at byte 1,500, .* bytes before it should") as caught:
        load(shrink, path, "torch")
    assert caught.value.code == "file_shrank"


def test_a_broken_disk_names_path_and_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, state(512))
    read = os.preadv

    def broken(descriptor: int, buffers: Any, offset: int) -> int:
        if offset > 500_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, [buffers[0][:100_000]], offset)  # short reads are read on

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(
        FileError, match=r"net\.pth cannot be read at byte \d{3},\d{3}.*Input/output"
    ) as caught:
        load(lambda: Net(512), path, "torch")
    assert caught.value.code == "file_unreadable"


def test_giving_back_leaves_everything_working() -> None:
    give_back()
    assert torch.ones(3).sum() == 3


def test_giving_back_returns_what_cuda_keeps_of_both_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("device"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: given.append("host"), raising=False)
    give_back()
    assert given == ["device", "host"]


MEASURE = """
import json, sys, torch
from pathlib import Path
from torch import nn
from app.boot.checkpoint import load

def peak():  # not getrusage: a child begins with its parent's maximum
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def build():
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))

path, dtype = sys.argv[1:]
torch.ones(1 << 16).to(torch.bfloat16).sum()
before = peak()
model = load(build, Path(path), "torch", dtype=getattr(torch, dtype), readers=4)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([peak() - before, size]))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """201 MB of float32 weights."""
    path = tmp_path_factory.mktemp("big") / "big.pth"
    torch.save({f"{i}.weight": torch.rand(2048, 2048) for i in range(12)}, path)
    return path


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1.1), ("bfloat16", 1.5)])
def test_peak_memory_is_the_model_and_a_few_blocks(big: Path, dtype: str, bound: float) -> None:
    """Same dtype: below 1.1 models. Cast: the four readers' blocks of 8 MiB more, not a float32 model."""
    run = [sys.executable, "-c", MEASURE, str(big), dtype]
    peak, size = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    print(f"{dtype}: {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB, {peak / size:.2f}")
    assert peak > 0.9 * size, "what was measured is the load"
    assert peak < bound * size


def test_load_is_not_slower_than_the_plain_way(big: Path) -> None:
    """In turn, the best of three each; the page cache is warm for both."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))

    best = {"load": 1e9, "plain": 1e9}
    for _ in range(3):
        for way, run in (("load", lambda: load(build, big, "torch")), ("plain", lambda: plain(build, big))):
            began = time.perf_counter()
            model = run()
            best[way] = min(best[way], time.perf_counter() - began)
            del model
    print(f"load {best['load']:.3f} s, torch.load {best['plain']:.3f} s: {best['load'] / best['plain']:.2f}")
    assert best["load"] < 1.5 * best["plain"]
