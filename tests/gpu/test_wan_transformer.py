"""Wan's transformer on a CUDA card: `python -m pytest -m gpu -s`. Random weights are enough."""

from __future__ import annotations

import copy
import time

import pytest
import torch

from app.models.wan.config import VARIANTS
from app.models.wan.layout import Conditions, Layout
from app.models.wan.sampler import FewStep, generate_blocks
from app.models.wan.schedule import SeededNoise
from app.models.wan.transformer import Transformer
from tests.models.wan.small import SIZE, model, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA CARD HERE: nothing of the GPU path is tested"
    ),
]


def clip(ours: Transformer, layout: Layout) -> torch.Tensor:
    conditions = Conditions({0: prompt("old"), 6: prompt("new")})
    blocks = generate_blocks(ours, layout, conditions, SeededNoise(0, ours.device))
    return torch.cat([block.latents for block in blocks], 2).cpu()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_card_gives_the_cpus_latents(dtype: torch.dtype, bound: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    layout = Layout(12, *SIZE, window=7, sink=1)
    here, there = clip(model(), layout), clip(copy.deepcopy(model()).to("cuda", dtype), layout)
    error = ((here - there).norm() / here.norm()).item()
    print(f"{dtype}: {error:.1e}")
    assert error < bound


def test_a_clip_never_waits_for_the_card() -> None:
    ours = copy.deepcopy(model()).to("cuda", torch.bfloat16)
    layout = Layout(12, *SIZE, window=6)
    embedding = prompt().to("cuda", torch.bfloat16)
    blocks = generate_blocks(ours, layout, Conditions({0: embedding}), SeededNoise(0, "cuda"))
    next(blocks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in blocks) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_time_of_a_block_of_the_real_size() -> None:
    with torch.device("cuda"):
        ours = Transformer(VARIANTS["1.3b"]).to(torch.bfloat16).eval().requires_grad_(False)
    embedding = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = time.perf_counter()
    blocks = generate_blocks(
        ours, Layout(21, 60, 104), Conditions({0: embedding}), SeededNoise(0, "cuda"), FewStep()
    )
    for block in blocks:
        torch.cuda.synchronize()
        after = time.perf_counter()
        print(f"block {block.index}: {1000 * (after - before):.0f} ms")
        before = after
        assert block.latents.isfinite().all()
    print(f"most memory held: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
