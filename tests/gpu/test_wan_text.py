"""Wan's text encoder on a CUDA card: `python -m pytest -m gpu -s`. Random weights are enough."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from app.models.source import Source
from app.models.wan.embeddings import EmbeddingCache
from app.models.wan.text import text_encoder
from app.models.wan.umt5 import UMT5Encoder
from app.models.wan.umt5_config import UMT5_NANO, UMT5_XXL
from app.progress import Silent
from tests import seeded
from tests.golden import draw
from tools.nano_tokenizer import nano_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="NO CUDA CARD HERE: nothing of the GPU path is tested"
    ),
]
PROMPTS = ["A cat walks slowly across the snow at sunset.", "", "a dog " * 200]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_the_card_gives_the_cpus_embeddings(tmp_path: Path, dtype: str, bound: float) -> None:
    model = draw(UMT5Encoder(UMT5_NANO), "text/").to(getattr(torch, dtype))
    torch.save(model.state_dict(), tmp_path / "t5.pth")
    (tmp_path / "tokenizer.json").write_text(nano_tokenizer())
    source = Source(tmp_path / "t5.pth", "torch", tmp_path / "t5.pth")
    here, there = (
        text_encoder(
            UMT5_NANO, source, tmp_path / "tokenizer.json", device=torch.device(name),
            cache=EmbeddingCache(None), weights_sha256=None, readers=2, progress=Silent(),
        )
        for name in ("cpu", "cuda")
    )  # fmt: skip
    ours, theirs = here.encode(PROMPTS).float(), there.encode(PROMPTS)
    assert theirs.device.type == "cuda"
    assert (ours - theirs.float().cpu()).norm() / ours.norm() < bound

    assert there.nbytes == sum(tensor.nbytes for tensor in model.parameters())
    there.offload()
    assert there.nbytes == 0
    assert torch.equal(there.encode(PROMPTS), theirs)  # remembered: T5 stays where it is
    assert there.nbytes == 0
    again = there.encode([PROMPTS[0] + " Again."])
    assert there.nbytes > 0
    there.release()
    assert torch.equal(there.encode([PROMPTS[0] + " Again."]), again)


def test_xxl_encodes_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """The published widths with random weights: time and peak memory of a prompt of 512 tokens."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = UMT5Encoder(UMT5_XXL)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        ids = (seeded.randn("gpu/ids", 1, 512).abs() * 1000).long().cuda()
        model(ids, torch.ones_like(ids))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        out = model(ids, torch.ones_like(ids))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    assert out.isfinite().all()
    with capsys.disabled():
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"\nUMT5-XXL, 512 tokens: {seconds * 1000:.1f} ms, peak {peak:.2f} GB")
