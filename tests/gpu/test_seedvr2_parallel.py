"""Two cards of one kind give what one gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from app.models.seedvr2 import windows
from app.models.seedvr2.parallel import SharedDiT
from app.nn.ranks import Ranks
from tests.models.sharing import SMALL, hold, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards"),
]


@pytest.mark.parametrize("kind", SMALL)
def test_two_cards_give_the_bits_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "RUN_TOKENS", 500)
    dtype, ranks = torch.bfloat16, Ranks(2, torch.device("cuda:0"))
    model = made(SMALL[kind], dtype, 500).to("cuda:0")
    try:
        with ranks.work(hold, kind, dtype, 500):
            shared = SharedDiT(model, f"{kind} {dtype}", ranks)
        vid, txt = (torch.randn(*size, device="cuda:0").to(dtype) for size in ((3, 40, 60, 33), (6, 16)))
        with torch.inference_mode():
            expected = model(vid, txt, 1000.0, model.plan(3, 40, 60, 6))
            assert torch.equal(shared(vid, txt, 1000.0, shared.plan(3, 40, 60, 6)), expected)
    finally:
        ranks.close()
