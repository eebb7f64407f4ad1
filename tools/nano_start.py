"""Where nano's training begins: weights that already pass pictures through, by principal components.

With a deep network's usual random start a CPU spends its hours on learning to copy. Here every residual
branch starts at nothing and the path beside it as the best linear code of small blocks: the autoencoder
begins as two levels of block-wise principal components, the transformer as "the condition, unchanged".
Constant channels, large against the signal, stand in what is normalised, so that a normalisation begins as a
mere change of scale that loses no mean. Knows nothing of data files or of training steps.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from app.models.seedvr2.dit import DiT, Modulation
from app.models.seedvr2.rope import frequencies
from app.models.seedvr2.vae import (
    Decoder,
    DownBlock,
    Downsample,
    Encoder,
    ResnetBlock,
    UpBlock,
    Upsample,
    VideoVAE,
)
from app.nn.causal_conv import CausalConv3d

CONSTANT = 64.0  # of the autoencoder's constant channels, one above and one below zero; signals are about 1
ANCHOR = 512.0  # of the transformer's; the noise in a token has a norm of 8
FAINT = 0.02  # of the usual random weights, where a path begins with a plain copy
# How strongly a head looks to its own side, by frequency of the rotary embedding, the fastest first.
LOOKS = (5.0, 4.2, 2.0)
SIDES = tuple((axis, step) for axis in range(3) for step in (-1, 1))  # neighbours along time, height, width


# ---------------------------------------------------------------- autoencoder


def start_vae(vae: VideoVAE, clips: Tensor) -> None:
    """Begin as levels of principal components of these clips, (n, 3, frames, height, width) in [-1, 1].

    The code is orthonormal: an error of a latent is an error of pixels of the same size. For an autoencoder
    that keeps every frame, of one group, whose halves each end in a width that holds its output twice.
    """
    widths = vae.config.block_out_channels
    assert vae.config.norm_num_groups == 1 and vae.config.temporal_scale_num == 0
    assert widths[-1] >= 2 * vae.config.latent_channels + 2 and widths[0] >= 8
    _quieten(vae)
    enc, dec = vae.encoder, vae.decoder
    _copy(enc.conv_in, 3)
    code, held, levels = clips, 3, []
    for stage, width in enumerate(widths[:-1]):
        wanted = min(4 * held, width, vae.config.latent_channels)
        mean, base = _components(_blocks(code), wanted)
        levels.append((mean, base, held))
        down, after = (cast(DownBlock, enc.down_blocks[at]) for at in (stage, stage + 1))
        _halve(cast(Downsample, down.downsamplers[0]).conv, mean, base, held)
        code, held = _coded(code, mean, base), wanted
        _copy(_shortcut(after), held, last=stage == len(widths) - 2)
    _read(enc, held)
    _copy(dec.conv_in, held)
    for stage, (mean, base, held) in enumerate(reversed(levels)):
        block, next_one = (cast(UpBlock, dec.up_blocks[at]) for at in (stage, stage + 1))
        up = cast(Upsample, block.upsamplers[0])
        _double(up.upscale_conv, mean, base, held)
        _copy(up.conv, held)
        _copy(_shortcut(next_one), held, last=stage == len(levels) - 1)
    _read(dec, 3)


def _quieten(vae: VideoVAE) -> None:
    """Paths begin with faint weights, residual branches end in zeros."""
    for name, module in vae.named_modules():
        if isinstance(module, CausalConv3d | nn.Linear):
            branch = name.endswith(("conv1", "conv2", "to_q", "to_k", "to_v"))
            module.weight.data.mul_(1.0 if branch else FAINT)
            assert module.bias is not None
            module.bias.data.zero_()
            if name.endswith(("conv2", "to_out.0")):  # what a residual branch adds
                module.weight.data.zero_()


def _shortcut(block: DownBlock | UpBlock) -> nn.Module | None:
    return cast(ResnetBlock, block.resnets[0]).conv_shortcut


def _copy(conv: nn.Module | None, count: int, *, last: bool = False) -> None:
    """Let so many channels begin as they come in; in a half's last stage once more with their sign changed,
    and two as constants."""
    assert isinstance(conv, CausalConv3d) and conv.bias is not None
    past, row, column = (size - 1 if i == 0 else size // 2 for i, size in enumerate(conv.kernel_size))
    for i in range(count):
        conv.weight.data[i, i, past, row, column] = 1
        if last:
            conv.weight.data[count + i, i, past, row, column] = -1
    if last:
        conv.weight.data[-2:] = 0
        conv.bias.data[-2:] = torch.tensor([CONSTANT, -CONSTANT])


def _read(half: Encoder | Decoder, count: int) -> None:
    """The last convolution begins as silu(u) - silu(-u) = u of channels that are held twice."""
    norm, conv = half.conv_norm_out, half.conv_out
    width = norm.num_channels
    norm.weight.data.fill_(CONSTANT * math.sqrt(2 / width))  # what the constants make it divide by
    norm.weight.data[-2:] = math.sqrt(2 / width)
    conv.weight.data[:count] = 0
    for i in range(count):
        conv.weight.data[i, i, -1, 1, 1] = 1
        conv.weight.data[i, count + i, -1, 1, 1] = -1


def _halve(conv: CausalConv3d, mean: Tensor, base: Tensor, held: int) -> None:
    """A convolution of stride 2 that begins as components of 2 x 2 blocks of its first `held` channels."""
    assert conv.bias is not None
    count = len(base)
    conv.weight.data[:count] = 0
    conv.weight.data[:count, :held, 0, :2, :2] = base.view(count, 2, 2, held).permute(0, 3, 1, 2)
    conv.bias.data[:count] = -(base @ mean)


def _double(conv: CausalConv3d, mean: Tensor, base: Tensor, held: int) -> None:
    """What `_halve` does, undone: (row, column, channel) of 2 x 2 blocks out of components."""
    assert conv.bias is not None
    count, width = len(base), conv.in_channels
    weight, bias = conv.weight.data.view(2, 2, width, width), conv.bias.data.view(2, 2, width)
    weight[:, :, :held] = 0
    weight[:, :, :held, :count] = base.T.view(2, 2, held, count)
    bias[:, :, :held] = mean.view(2, 2, held)


def _blocks(x: Tensor) -> Tensor:
    """(n, C, T, H, W) -> 2 x 2 blocks, (blocks, 4 C), in the order row, column, channel."""
    n, c, t, h, w = x.shape
    return x.view(n, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(-1, 4 * c)


def _coded(x: Tensor, mean: Tensor, base: Tensor) -> Tensor:
    n, _, t, h, w = x.shape
    return ((_blocks(x) - mean) @ base.T).view(n, t, h // 2, w // 2, -1).permute(0, 4, 1, 2, 3)


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and the first principal components, (count, d)."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean)).double() / len(x))
    return mean, vectors[:, -count:].flip(1).T.float()


def trainable(vae: VideoVAE) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights of the decoder that write into its last stage's path, with masks, 0 where a channel is
    constant: there a small step is a leap."""
    masks = []
    for block in cast(UpBlock, vae.decoder.up_blocks[-1]).resnets:
        assert isinstance(block, ResnetBlock)
        for conv in (block.conv2, block.conv_shortcut):
            if conv is not None:
                for parameter in conv.parameters():
                    mask = torch.ones_like(parameter)
                    mask[-2:] = 0
                    masks.append((parameter, mask))
    return masks


# ---------------------------------------------------------------- transformer


def start_dit(dit: DiT, patches: Tensor) -> None:
    """Begin as the condition unchanged; `patches` (n, 64) are conditions' patches, for their components.

    A token's channels: 64 that hold noise - condition, which is the velocity; the condition's components,
    of unit variance, for the layers to read; free ones; last the anchor, a constant. Each head begins as a
    look at one neighbour: the rotary embedding turns two constant vectors into a peak at its place.
    """
    dim, volume = dit.config.dim, 64
    eye = torch.eye(volume)
    known = slice(volume, 2 * volume)
    assert dim > 2 * volume and dit.config.heads == len(SIDES)
    mean, base = _components(patches, volume)
    deviation = ((patches - mean) @ base.T).std(0).clamp_min(0.03)
    into = torch.zeros(dim, 4, 33)
    into[:volume, :, :16] = eye.view(volume, 4, 16)
    into[:volume, :, 16:32] = -eye.view(volume, 4, 16)
    read = base / deviation[:, None]
    into[known, :, 16:32] = read.view(-1, 4, 16)
    dit.vid_in.proj.weight.data = into.flatten(1)
    bias = torch.zeros(dim)
    bias[known] = -(read @ mean)
    bias[-1] = ANCHOR
    dit.vid_in.proj.bias.data = bias
    dit.emb_in.proj_out.weight.data.zero_()
    dit.emb_in.proj_out.bias.data.zero_()
    rms = math.sqrt((ANCHOR**2 + 2 * volume) / dim)
    for module in dit.modules():
        if isinstance(module, Modulation):
            for slot in ("attn", "mlp"):
                scale = torch.full((dim,), rms)
                scale[-1] = rms / ANCHOR  # read as 1
                module.get_parameter(f"{slot}_scale").data = scale
                module.get_parameter(f"{slot}_gate").data.fill_(1.0)
    for name, parameter in dit.named_parameters():
        if name.startswith("blocks") and ".proj_out." in name:
            parameter.data.zero_()
        elif name.startswith("blocks") and parameter.ndim == 2:
            parameter.data[:, :volume] = 0  # noise is not read
        if name.endswith(("proj_qkv.vid.weight", "proj_qkv.all.weight")):
            _look(parameter.data.view(3, dit.config.heads, dit.config.head_dim, dim), frequencies(dit.config))
        if ".norm_q." in name or ".norm_k." in name:
            looks = torch.full((dit.config.rope_frequencies,), 1.0)
            looks[: len(LOOKS)] = torch.tensor(LOOKS)
            parameter.data = looks.repeat_interleave(2).repeat(3)
    out = torch.zeros(volume, dim)
    out[:, :volume] = eye * rms
    dit.vid_out.proj.weight.data = out
    dit.vid_out.proj.bias.data.zero_()


def _look(qkv: Tensor, freqs: Tensor) -> None:
    """Weights (3, heads, head_dim, D) with which each head attends to its neighbour and hands on the first
    components of it. The angle between query and key is what the rotary embedding turns over one step."""
    qkv[:2, :, :, :] = qkv[:2] * FAINT
    qkv[:2, :, :, -1] = 0
    qkv[2] *= 0.3
    qkv[:2, :, 0::2, -1] = 1  # along the real axis
    for head, (axis, step) in enumerate(SIDES):
        first = 2 * axis * len(freqs)
        pairs = slice(first, first + 2 * len(freqs))
        qkv[0, head, pairs, -1] = torch.stack([(freqs * step).cos(), (freqs * step).sin()], 1).flatten()
        for i in range(qkv.shape[2]):
            qkv[2, head, i, 64 + i] = 1
