import subprocess
import sys

import pytest
import torch
from torch import Tensor

from app.models.seedvr2 import windows
from app.models.seedvr2.config import config_3b, config_7b
from app.models.seedvr2.dit import Attention, DiT
from app.models.seedvr2.rope import text_rotations, video_rotations
from app.models.seedvr2.steps import rms_norm
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


@pytest.mark.parametrize("run_tokens", [500, windows.RUN_TOKENS])
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layer", [0, 1])
def test_grouped_windows_equal_window_by_window(
    kind: str, layer: int, run_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "RUN_TOKENS", run_tokens)
    model = draw(DiT(SMALL[kind]), "")
    size, length = (3, 20, 30), 6
    vid, txt = torch.randn(3 * 20 * 30, 64), torch.randn(length, 64)
    plan = model.plan(3, 40, 60, length)
    parts = plan.partitions[layer]
    attn = model.blocks[layer].attn
    with torch.inference_mode():
        texts = plan.text_mean(parts)
        heads = attn.text_heads(txt, plan)
        ordered = vid[parts.order]
        vid_out = torch.cat(
            [attn(ordered[run[0].start : run[-1].stop], heads, plan, run, texts) for run in parts.runs]
        )
        txt_out = attn.proj_out.text(texts.mean())
        expected = plain_attention(attn, vid, txt, size, layer)
    torch.testing.assert_close(vid_out, expected[: len(vid)][parts.order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(txt_out, expected[len(vid) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_a_pass_in_many_runs_equals_one_in_a_single_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = draw(DiT(SMALL[kind]), "")
    vid, txt = torch.randn(3, 40, 60, 33), torch.randn(6, 16)
    passes, runs = [], []
    for run_tokens in (10**9, 500):
        monkeypatch.setattr(windows, "RUN_TOKENS", run_tokens)
        plan = model.plan(3, 40, 60, 6)
        runs.append({len(parts.runs) for parts in plan.partitions})
        with torch.inference_mode():
            passes.append(model(vid, txt, 1000.0, plan))
    assert runs[0] == {1}
    assert min(runs[1]) > 3
    torch.testing.assert_close(passes[0], passes[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.linspace(-1, 2, 64), None])
def test_rms_norm_is_torchs(dtype: torch.dtype, weight: Tensor | None) -> None:
    # 300 squared times 64 is beyond float16: the sum must not be taken in it.
    x = (torch.randn(7, 3, 64) * 300).to(dtype)[:, :2]
    weight = weight if weight is None else weight.to(dtype)
    ours, torchs = rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, torchs, rtol=torch.finfo(dtype).eps * 3, atol=0)


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
    """A full rope table of 1024 x 128 x 128 positions takes 8.5 GB, and queries, keys, values and the MLP's
    hidden layer of all tokens at once would take 10 times the tokens' own 18 MiB."""
    code = """
import torch
from app.models.seedvr2.config import config_3b
from app.models.seedvr2.dit import DiT
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
def run(t, h, w): model(torch.randn(t, h, w, 33), torch.randn(58, 16), 1000.0, model.plan(t, h, w, 58))
model = DiT(config_3b(dim=256, heads=2, layers=2, separate=1, text_dim=16))
with torch.inference_mode():
    run(1, 4, 4)
    before = peak()
    run(5, 90, 160)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Not ru_maxrss: a child's begins at its parent's peak, and then nothing is seen to grow.
    print(f"peak of a pass over 18000 tokens of width 256: {float(out.stdout):.0f} MiB")
    assert float(out.stdout) < 8 * 18
