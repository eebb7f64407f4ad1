"""Compiled steps: the numbers of the plain ones, and compiled once, whatever comes.

They are compiled by g++ here; what a card's compiler makes of the same steps a card must show.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.device import place
from app.models.seedvr2 import steps as seedvr2
from app.models.seedvr2.config import config_3b, config_7b
from app.models.seedvr2.dit import DiT
from app.models.seedvr2.load import load_dit, load_restorer
from app.models.seedvr2.offload import place_blocks
from app.models.seedvr2.parallel import SharedDiT
from app.models.source import Loading, Source
from app.models.wan import steps as wan
from app.models.wan.config import TransformerConfig
from app.models.wan.load import load_generator
from app.models.wan.transformer import Transformer
from app.nn.compiled import Compiler
from app.nn.ranks import Ranks
from app.progress import Silent
from tests.golden import draw
from tests.models.wan.nano import sources
from tests.models.wan.small import IMAGE
from tests.models.wan.small import SMALL as WAN

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: nothing can be compiled here"),
    pytest.mark.slow,
]

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
DITS = {
    "3b": config_3b(dim=64, heads=2, head_dim=32, layers=4, separate=2, text_dim=16),
    "7b": config_7b(dim=64, heads=2, head_dim=32, layers=4, text_dim=16),
}
# (frames, height, width) of latents: one token, one window, odd windows, several runs
SIZES = [(1, 2, 2), (1, 4, 6), (2, 8, 12), (5, 14, 10), (3, 40, 60)]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        yield Compiler(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def never_again() -> Any:
    """Within it a second compilation is an error."""
    import torch._dynamo.config

    return torch._dynamo.config.patch(error_on_recompile=True)


def near(one: Tensor, other: Tensor) -> None:
    """Equal within the rounding of some layers, of which each rounds less often where steps are fused."""
    few = 2e-5 if one.dtype == torch.float32 else 0.02
    assert one.dtype == other.dtype
    assert (one - other).abs().max() < few * other.abs().max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", DITS)
def test_clips_of_all_sizes_pass_one_compiled_seedvr2(
    kind: str, dtype: torch.dtype, compiler: Compiler, never_again: Any
) -> None:
    config = DITS[kind]
    model = draw(DiT(config), "compiled/").to(dtype)
    steps = seedvr2.compiled(config, CPU, dtype, compiler)
    streamed = copy.deepcopy(model)
    place_blocks(streamed, CPU, stream=True)
    text = torch.randn(6, 16, dtype=dtype)
    with torch.inference_mode(), never_again:
        for size in SIZES:
            latents = torch.randn(*size, 33, dtype=dtype)
            plan = model.plan(*size, len(text))
            assert plan.steps is seedvr2.PLAIN
            plain = model(latents, text, 500.0, plan)
            near(model(latents, text, 500.0, replace(plan, steps=steps)), plain)
        streamed.steps = steps
        near(streamed(latents, text, 500.0, streamed.plan(*size, len(text))), plain)


def test_models_of_two_widths_have_code_of_their_own(compiler: Compiler, never_again: Any) -> None:
    """Code for every width would be slower for both of them, and take a third width as well."""
    torch._dynamo.reset()
    configs = [config_3b(dim=32 * heads, heads=heads, head_dim=32, layers=2, text_dim=16) for heads in (2, 3)]
    both = [seedvr2.compiled(config, CPU, torch.float32, compiler) for config in configs]
    with torch.inference_mode(), never_again:
        for steps, config in zip(both, configs, strict=True):
            x, scale, shift = torch.randn(5, config.dim), torch.randn(config.dim), torch.randn(config.dim)
            near(steps.modulate(x, scale, shift, 1e-5), seedvr2.modulate(x, scale, shift, 1e-5))
        with pytest.raises(torch._dynamo.exc.RecompileError):
            both[0].modulate(torch.randn(5, 80), torch.randn(80), torch.randn(80), 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("config", [WAN, IMAGE], ids=["t2v", "i2v"])
def test_blocks_of_all_sizes_and_pasts_pass_one_compiled_wan(
    config: TransformerConfig, dtype: torch.dtype, compiler: Compiler, never_again: Any
) -> None:
    model = draw(Transformer(config), "compiled/").to(dtype).requires_grad_(False)
    steps = wan.compiled(config, CPU, dtype, compiler)
    with torch.inference_mode(), never_again:
        seen = torch.randn(1, 257, config.image_dim, dtype=dtype) if config.image else None
        cross = model.cross(torch.randn(1, 5, config.text_dim, dtype=dtype), seen)
        for height, width, sink in ((2, 2, 0), (4, 6, 0), (6, 10, 1)):
            caches = [model.cache(height, width, 5, sink=sink) for _ in "ab"]
            for start, frames in ((0, 1), (1, 3), (4, 3), (7, 2)):  # it fills, then rolls past its end
                x = torch.randn(1, 16, frames, height, width)
                y = torch.randn(1, 20, frames, height, width) if config.image else None
                for times in (torch.full((1, 1), 500.0), torch.rand(1, frames) * 1000):
                    found = []
                    plans = [model.plan(frames, height, width, start=start, cache=cache) for cache in caches]
                    for each, plan, cache in zip((wan.PLAIN, steps), plans, caches, strict=True):
                        model.steps = each
                        found.append(model(x, times, cross, plan, cache, y=y))
                        cache.count = start
                    near(found[1], found[0])
                for cache in caches:
                    cache.count = start + frames
        model.steps = steps
        x, times = torch.randn(2, 16, 3, 4, 6), torch.rand(2, 3) * 1000
        y = torch.randn(2, 20, 3, 4, 6) if config.image else None
        both = model.cross(
            torch.randn(2, 5, config.text_dim, dtype=dtype), None if seen is None else seen.repeat(2, 1, 1)
        )
        made = model(x, times, both, model.plan(3, 4, 6), y=y)
        model.steps = wan.PLAIN
        near(made, model(x, times, both, model.plan(3, 4, 6), y=y))


def test_models_from_files_are_compiled_and_their_code_is_kept(
    nano_volume: Path, wan_volume: Path, compiler: Compiler
) -> None:
    torch._dynamo.reset()  # what was compiled before is to be found in the folder, not in this process
    loading = Loading(place("cpu", "float32"), 2, Silent(), compiler=compiler)
    folder = nano_volume / "nano/seedvr2"
    names = {"dit": "seedvr2_ema_nano.pth", "vae": "ema_vae.pth", "positive": "pos_emb.pt"}
    names["negative"] = "neg_emb.pt"
    files = {part: Source(folder / name, "torch", folder / name) for part, name in names.items()}
    dit = load_restorer("nano", files, loading).dit
    transformer = load_generator("nano", sources(wan_volume), loading)._transformer
    assert isinstance(dit, DiT) and isinstance(transformer, Transformer)
    assert dit.plan(1, 4, 6, 2).steps is dit.steps is not seedvr2.PLAIN
    assert transformer.steps is not wan.PLAIN
    assert compiler.folder is not None and list(compiler.folder.rglob("*.so"))


def test_two_processes_compile_and_share_a_pass_in_float8(nano_volume: Path, compiler: Compiler) -> None:
    path = nano_volume / "nano/seedvr2/seedvr2_ema_nano.pth"
    how = "torch", "nano", torch.bfloat16, "widened", 1, compiler
    alone, plain = load_dit(path, CPU, *how), load_dit(path, CPU, *how[:-1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bits of a product may depend on it
    ranks = Ranks(2, CPU, patience=60)
    try:
        shared = SharedDiT.load(load_dit, ranks, path, *how)
        latents, text = torch.randn(3, 24, 32, 33).bfloat16(), torch.randn(5, 64).bfloat16()
        with torch.inference_mode():
            expected = alone(latents, text, 1000.0, alone.plan(3, 24, 32, 5))
            told = plain(latents, text, 1000.0, plain.plan(3, 24, 32, 5))
            # Trained weights carry bfloat16's rounding on: the plain pass is 3% from float32's, this one too.
            assert (expected - told).abs().mean() < 0.05 * told.abs().mean()
            assert torch.equal(shared(latents, text, 1000.0, shared.plan(3, 24, 32, 5)), expected)
    finally:
        ranks.close()
        torch.set_num_threads(threads)
