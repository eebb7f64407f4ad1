import subprocess
import sys

import pytest
import torch
from torch import Tensor

from app.models.seedvr2.config import config_3b, config_7b
from app.models.seedvr2.dit import Attention, DiT
from app.models.seedvr2.rope import text_rotations, video_rotations
from app.models.seedvr2.windows import make_windows
from tests.golden import draw

SMALL = {
    "3b": config_3b(dim=64, heads=2, head_dim=32, layers=4, separate=2, text_dim=16),
    "7b": config_7b(dim=64, heads=2, head_dim=32, layers=4, text_dim=16),
}


def turned(x: Tensor, rotations: Tensor | None) -> Tensor:
    """Rotary embedding by its definition, pair by pair."""
    if rotations is None:
        return x
    cos, sin = rotations.real[:, None], rotations.imag[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def plain_attention(
    attn: Attention, vid: Tensor, txt: Tensor, size: tuple[int, int, int], layer: int
) -> Tensor:
    """Joint window attention as the paper tells it: window by window, softmax written out."""
    config = attn.config
    heads = (3, config.heads, config.head_dim)
    vid_qkv = attn.proj_qkv.video(vid).view(*size, *heads)
    txt_qkv = attn.proj_qkv.text(txt).view(-1, *heads)
    out = torch.empty(*size, config.inner_dim)
    texts = []
    for window in make_windows(size, config.windows[layer], config.shifted[layer]):
        piece = vid_qkv[window]
        shape = (piece.shape[0], piece.shape[1], piece.shape[2])
        piece = piece.flatten(0, 2)
        vid_rope = video_rotations(config, shape, len(txt))
        txt_rope = text_rotations(config, len(txt))
        q, k = (
            torch.cat(
                [
                    turned(rms(piece[:, i]) * norm.video.weight, vid_rope),
                    turned(rms(txt_qkv[:, i]) * norm.text.weight, txt_rope),
                ]
            )
            for i, norm in ((0, attn.norm_q), (1, attn.norm_k))
        )
        v = torch.cat([piece[:, 2], txt_qkv[:, 2]])
        scores = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        out[window] = mixed[: len(piece)].view(*shape, -1)
        texts.append(mixed[len(piece) :])
    vid_out = attn.proj_out.video(out.flatten(0, 2))
    return torch.cat([vid_out, attn.proj_out.text(torch.stack(texts).mean(0))])


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layer", [0, 1])
def test_grouped_windows_equal_window_by_window(kind: str, layer: int) -> None:
    model = draw(DiT(SMALL[kind]), "")
    size, length = (5, 11, 14), 6
    vid, txt = torch.randn(5 * 11 * 14, 64), torch.randn(length, 64)
    plan = model.plan(5, 22, 28, length)
    windows = plan.partitions[layer]
    attn = model.blocks[layer].attn
    with torch.inference_mode():
        vid_out, txt_out = attn(vid[windows.order], txt, plan, windows)
        expected = plain_attention(attn, vid, txt, size, layer)
    torch.testing.assert_close(vid_out, expected[: len(vid)][windows.order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(txt_out, expected[len(vid) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_a_pass_changes_neither_its_input_nor_the_next_pass(kind: str) -> None:
    model = draw(DiT(SMALL[kind]), "")
    plan = model.plan(2, 8, 12, 5)
    vid, txt = torch.randn(2, 8, 12, 33), torch.randn(5, 16)
    before = vid.clone(), txt.clone()
    with torch.inference_mode():
        first = model(vid, txt, 1000.0, plan)
        second = model(vid, txt, 1000.0, plan)
    assert torch.equal(first, second)
    assert torch.equal(vid, before[0])
    assert torch.equal(txt, before[1])


def test_bfloat16_stays_near_float32() -> None:
    model = draw(DiT(SMALL["3b"]), "")
    plan = model.plan(2, 8, 12, 5)
    vid, txt = torch.randn(2, 8, 12, 33), torch.randn(5, 16)
    with torch.inference_mode():
        full = model(vid, txt, 1000.0, plan)
        half = model.bfloat16()(vid.bfloat16(), txt.bfloat16(), 1000.0, plan)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() / full.norm() < 0.03


def test_latents_that_do_not_divide_are_refused() -> None:
    with torch.device("meta"):
        model = DiT(SMALL["3b"])
    with pytest.raises(ValueError, match="1x7x8"):
        model.plan(1, 7, 8, 5)


def test_text_shares_its_position_on_all_axes_and_video_starts_after_it() -> None:
    config = SMALL["3b"]
    text = text_rotations(config, 4)
    video = video_rotations(config, (2, 5, 5), 4)
    assert text is not None
    freqs = config.rope_frequencies
    torch.testing.assert_close(text[3, :freqs], text[3, freqs : 2 * freqs])
    # The first video token of the second frame: time 5, height 0, width 0.
    angle = video.view(2, 5, 5, -1)[1, 0, 0, 0].angle()
    assert angle == pytest.approx(5.0 - 2 * torch.pi, abs=1e-5)
    assert torch.equal(video[0, freqs : 3 * freqs], torch.ones(2 * freqs, dtype=torch.complex64))


def test_memory_of_a_pass_is_that_of_its_tokens() -> None:
    """A full table of 1024 x 128 x 128 positions takes 8.5 GB; a small pass must take almost nothing."""
    code = """
import resource, torch
from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
model = DiT(config_3b(dim=128, heads=1, layers=2, separate=1, text_dim=16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    model(torch.randn(5, 20, 32, 33), torch.randn(58, 16), 1000.0, model.plan(5, 20, 32, 58))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 150, "MiB"
