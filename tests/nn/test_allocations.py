import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from app.nn.allocations import Allocations, Stand

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_are_counted_as_they_come_and_go(device: str) -> None:
    before = torch.empty(1000, device=device)
    with Allocations(device) as taken:
        x = torch.empty(1000, device=device)
        assert taken.bytes == 4000
        view = x[10:].view(2, 495)
        x.add_(before)
        assert taken.bytes == taken.peak == 4000  # views, what lay there before and work in place are free
        y = x * 2
        assert taken.bytes == 8000
        del x
        assert taken.bytes == 8000, "a view holds all of it"
        del view, y
        assert taken.bytes == 0
        before.mul_(2)
        del before
        assert taken.bytes == 0
    assert taken.peak == 8000


def test_another_device_is_not_counted() -> None:
    with Allocations("meta") as taken:
        kept = torch.empty(1000)
    assert taken.peak == 0 and len(kept) == 1000


def test_attention_is_fused_and_norms_are_kernels_where_meta_stands_for_a_card() -> None:
    q = torch.empty(1, 1, 4096, 8, dtype=torch.float16, device="meta")
    with Allocations("meta") as taken, Stand("cuda"):
        out = F.scaled_dot_product_attention(q, q, q)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert q.is_cuda and F.rms_norm(q, (8,)).shape == q.shape
        assert F.group_norm(torch.empty(2, 8, 4, 4, device="meta"), 4).shape == (2, 8, 4, 4)
    assert taken.peak < 4 * q.nbytes
    assert not q.is_cuda


def test_what_is_prepared_is_what_counting_imports() -> None:
    """A second that a job need not wait for: afterwards a count imports nothing of torch's compiler."""
    code = (
        "import sys, torch; from app.nn.allocations import prepare, taken;"
        "prepare(); before = set(sys.modules);"
        "layer = torch.nn.Conv3d(2, 2, 3, device='meta'); x = torch.empty(1, 2, 4, 4, 4, device='meta');"
        "print(taken(lambda: layer(x).add(1).half(), 'cuda').peak > 0, set(sys.modules) - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.strip() == "True set()", ran.stdout
