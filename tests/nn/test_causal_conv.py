"""The causal convolution: equal to padding and torch's own, whole, in slices and for one frame."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app.nn import causal_conv
from app.nn.causal_conv import CausalConv3d, CausalState
from tests.seeded import randn

# kernel, stride, padding, margin, zeros: every kind the video autoencoders have.
KINDS = [
    ((3, 3, 3), (1, 1, 1), 1, 0, False),
    ((3, 3, 3), (2, 2, 2), 0, 1, False),
    ((1, 3, 3), (1, 2, 2), 0, 1, False),
    ((1, 1, 1), (1, 1, 1), 0, 0, False),
    ((3, 1, 1), (2, 1, 1), 0, 0, False),
    ((4, 3, 3), (1, 1, 1), 1, 0, False),
    ((3, 3, 3), (1, 1, 1), 1, 0, True),
    ((3, 1, 1), (1, 1, 1), 0, 0, True),
]


def make(kind, batch: int, frames: int) -> tuple[CausalConv3d, Tensor]:
    kernel, stride, padding, margin, zeros = kind
    conv = CausalConv3d(5, 7, kernel, stride=stride, padding=padding, margin=margin, zeros=zeros)
    conv.requires_grad_(False)
    conv.weight.copy_(randn("conv", *conv.weight.shape) / conv.weight[0].numel() ** 0.5)
    return conv, randn("x", batch, 5, frames, 8, 10)


def plain(conv: CausalConv3d, x: Tensor) -> Tensor:
    """What the layer means: frames of copies or zeros in front, a border of zeros, torch's convolution."""
    before = x[:, :, :1].expand(-1, -1, conv.past, -1, -1)
    x = torch.cat([torch.zeros_like(before) if conv.zeros else before, x], dim=2)
    x = F.pad(x, (0, conv.margin, 0, conv.margin))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.border)


@pytest.mark.parametrize("frames", [1, 3, 9])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_padding_and_convolving(kind, batch, frames):
    conv, x = make(kind, batch, frames)
    torch.testing.assert_close(conv(x), plain(conv, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("edges", [(0, 1, 9), (0, 3, 5, 9), (0, 1, 3, 5, 7, 9), (0, 9)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_slices_equal_the_whole(kind, edges):
    conv, x = make(kind, 2, 9)
    state = CausalState()
    sliced = [conv(x[:, :, a:b], state) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(sliced, dim=2), plain(conv, x), rtol=0, atol=1e-5)


def test_state_does_not_keep_the_slice_alive():
    conv, x = make(KINDS[0], 1, 9)
    state = CausalState()
    conv(x, state)
    tail = state.tail(conv)
    assert tail.shape[2] == 2
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_window_filled_by_the_caller():
    conv, x = make(KINDS[1], 2, 5)
    window = conv.window(x, *x.shape[2:])
    conv.own(window).copy_(x)
    torch.testing.assert_close(conv.over(window), plain(conv, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [1, 5 * 2 * 10 * 12 * 4, 10**6])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sixteen_bits_without_their_arithmetic(kind, most, dtype, monkeypatch):
    """The exact convolution of what is stored, rounded once, however few frames are widened at a time."""
    monkeypatch.setattr(causal_conv, "slow_in", lambda of: of != torch.float32)
    monkeypatch.setattr(causal_conv, "WIDENED", most)
    conv, x = make(kind, 2, 9)
    conv, x = conv.to(dtype), x.to(dtype)
    out = conv(x)
    exact = plain(conv.double(), x.double())
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_input_beyond_32_bits_passes_in_parts(kind, monkeypatch):
    conv, x = make(kind, 2, 9)
    monkeypatch.setattr(causal_conv, "_onednn_is_available", lambda: False)
    monkeypatch.setattr(causal_conv, "LARGEST", 2 * 5 * 9 * 11 * 4)  # four frames
    torch.testing.assert_close(conv(x), plain(conv, x), rtol=0, atol=1e-5)


def test_a_result_beyond_32_bits_passes_in_parts(monkeypatch):
    conv, x = CausalConv3d(3, 8, padding=1), torch.randn(1, 3, 9, 6, 8)
    monkeypatch.setattr(causal_conv, "_onednn_is_available", lambda: False)
    monkeypatch.setattr(causal_conv, "LARGEST", 8 * 6 * 8 * 4)  # four frames of the result, ten of the input
    made, real = [], F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda *arguments: made.append(real(*arguments)) or made[-1])
    out = conv(x)
    monkeypatch.undo()
    torch.testing.assert_close(out, conv(x), rtol=0, atol=1e-5)
    assert len(made) > 1 and max(part.numel() for part in made) <= 8 * 6 * 8 * 4
