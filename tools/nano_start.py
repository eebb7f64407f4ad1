"""Where nano's training begins: weights that already pass pictures through, by principal components.

With a deep network's usual random start a CPU spends its hours on learning to copy. Here every residual
branch starts at nothing and the path beside it as the best linear code of small blocks: the autoencoder
begins as two levels of block-wise principal components, the transformer as "the condition, unchanged".
Two constant channels, one above and one below zero, both large against the signal, stand in what is
normalised, so that a normalisation begins as a mere change of scale that loses no mean. Knows nothing of
data files or of training steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from app.models.seedvr2.dit import DiT, Modulation
from app.models.seedvr2.vae import Decoder, Encoder, VideoVAE
from app.nn.causal_conv import CausalConv3d
from tools.nano_forward import encode, features, trunk

CONSTANT = 10.0  # of the autoencoder's constant channels; signals are about 1
ANCHOR = 40.0  # of the transformer's; the noise in a token has a norm of 8
FAINT = 0.02  # of the usual random weights, where a path begins with a plain copy


def start_vae(vae: VideoVAE, clips: Tensor) -> None:
    """Begin as two levels of principal components of these clips, (n, 3, frames, height, width).

    For three stages of which the last halving also halves time, and one group.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d | nn.Linear):
            module.weight.data.mul_(FAINT if module not in _branches(vae) else 1.0)
            assert module.bias is not None
            module.bias.data.zero_()
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):  # what a residual branch adds
            module.get_parameter("weight").data.zero_()
    first, second, third = vae.config.block_out_channels
    coarse, fine = first - 2, second - 2  # channels besides the constants
    enc, dec = vae.encoder, vae.decoder

    blocks = _space(clips)
    mean, base, _ = _components(blocks, coarse)
    code = (blocks - mean) @ base.T / 2
    _copy(enc.conv_in, {i: i for i in range(3)}, constants=_constants(first))
    at = _signals(first, coarse)
    down = enc.down_blocks[0].downsamplers[0].conv
    for i, channel in enumerate(at):
        for y in range(2):
            for x in range(2):
                down.weight.data[channel, :3, 0, y, x] = base[i].view(2, 2, 3)[y, x] / 2
        down.bias.data[channel] = -(mean @ base[i]) / 2
    for channel in _constants(first):
        down.weight.data[channel, channel, 0, 0, 0] = 1
    _copy(enc.down_blocks[1].resnets[0].conv_shortcut, dict(enumerate(at)), constants=_constants(second))

    levels = _time(code.view(len(clips), clips.shape[2], clips.shape[3] // 2, clips.shape[4] // 2, coarse))
    mean2, base2, deviation = _components(levels, fine)
    at2 = _signals(second, fine)
    down = enc.down_blocks[1].downsamplers[0].conv
    for i, channel in enumerate(at2):
        for t in range(2):
            for y in range(2):
                for x in range(2):
                    down.weight.data[channel, :coarse, t + 1, y, x] = base2[i].view(2, 2, 2, coarse)[t, y, x]
        down.weight.data[channel] /= deviation[i]
        down.bias.data[channel] = -(mean2 @ base2[i]) / deviation[i]
    for channel in _constants(second):
        down.weight.data[channel, channel, 2, 0, 0] = 1
    _copy(enc.down_blocks[2].resnets[0].conv_shortcut, dict(enumerate(at2)), constants=_constants(third))
    _fit_features(enc, clips, trunk(enc, clips)[:, :fine])

    _copy(dec.conv_in, {i: i for i in range(fine)}, constants=_constants(third))
    up = dec.up_blocks[0].upsamplers[0]
    view = up.upscale_conv.weight.data.view(2, 2, 2, third, third)
    bias = up.upscale_conv.bias.data.view(2, 2, 2, third)
    inverse = base2.T * deviation
    for t in range(2):
        for y in range(2):
            for x in range(2):
                rows = inverse.view(2, 2, 2, coarse, fine)[t, y, x]
                view[y, x, t, :coarse, :fine] = rows
                bias[y, x, t, :coarse] = mean2.view(2, 2, 2, coarse)[t, y, x]
    for sign, channel in zip((1, -1), _constants(third), strict=True):
        view[..., channel, :] = 0
        bias[..., channel] = sign * CONSTANT
    _copy(up.conv, {i: i for i in range(third)})
    _copy(
        dec.up_blocks[1].resnets[0].conv_shortcut,
        {i: i for i in range(coarse)},
        constants=_constants(second),
    )
    up = dec.up_blocks[1].upsamplers[0]
    view = up.upscale_conv.weight.data.view(2, 2, second, second)
    bias = up.upscale_conv.bias.data.view(2, 2, second)
    for y in range(2):
        for x in range(2):
            view[y, x, :3, :coarse] = base.T.view(2, 2, 3, coarse)[y, x] * 2
            bias[y, x, :3] = mean.view(2, 2, 3)[y, x]
    for sign, channel in zip((1, -1), _constants(second), strict=True):
        view[..., channel, :] = 0
        bias[..., channel] = sign * CONSTANT
    _copy(up.conv, {i: i for i in range(second)})
    _copy(dec.up_blocks[2].resnets[0].conv_shortcut, {i: i for i in range(3)}, constants=_constants(first))
    _fit_features(dec, encode(vae, clips), clips)


def _branches(vae: VideoVAE) -> set[nn.Module]:
    """Convolutions inside residual branches and attentions, which keep their random start."""
    return {
        module
        for name, module in vae.named_modules()
        if name.endswith(("conv1", "conv2", "to_q", "to_k", "to_v"))
    }


def _constants(width: int) -> list[int]:
    return [width - 2, width - 1]


def _signals(width: int, count: int) -> list[int]:
    """Channels that are not constant."""
    return [i for i in range(width) if i not in _constants(width)][:count]


def _copy(conv: nn.Module | None, pairs: dict[int, int], constants: list[int] | None = None) -> None:
    """Let output channel i begin as input channel pairs[i], and these as constants."""
    assert isinstance(conv, CausalConv3d) and conv.bias is not None
    past, row, column = (size - 1 if i == 0 else size // 2 for i, size in enumerate(conv.kernel_size))
    for out, into in pairs.items():
        conv.weight.data[out, into, past, row, column] = 1
    for sign, channel in zip((1, -1), constants or (), strict=False):
        conv.weight.data[channel] = 0
        conv.bias.data[channel] = sign * CONSTANT


def _space(clips: Tensor) -> Tensor:
    """(n, 3, T, H, W) -> 2 x 2 blocks, (n T H/2 W/2, 12) in the order y, x, colour."""
    n, c, t, h, w = clips.shape
    return clips.view(n, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(-1, 4 * c)


def _time(code: Tensor) -> Tensor:
    """(n, T, H, W, c) -> blocks of 2 frames x 2 x 2, the first frame left out."""
    n, t, h, w, c = code.shape
    blocks = code[:, 1:].view(n, t // 2, 2, h // 2, 2, w // 2, 2, c)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 8 * c)


def _components(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the first principal components (count, d), and the data's deviations along them."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean)).double() / len(x))
    top = slice(len(values) - count, None)
    return mean, vectors[:, top].flip(1).T.float(), values[top].flip(0).sqrt().float()


def _fit_features(half: Encoder | Decoder, x: Tensor, wanted: Tensor) -> None:
    """Let `conv_out` begin as the least squares from what it sees to what is wanted."""
    half.conv_norm_out.weight.data.fill_(1.0)
    half.conv_norm_out.bias.data.fill_(2.0)  # where silu is nearly straight
    _fit_out(half.conv_out, features(half, x), wanted)


def _fit_out(conv: CausalConv3d, features: Tensor, wanted: Tensor) -> None:
    x = features.transpose(0, 1).flatten(1).T
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    y = wanted.transpose(0, 1).flatten(1).T.double()
    eye = 1e-6 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(x.T @ x + eye, x.T @ y).float()
    count = y.shape[1]
    conv.weight.data[:count] = 0
    conv.weight.data[:count, :, -1, 1, 1] = solved[:-1].T
    assert conv.bias is not None
    conv.bias.data[:count] = solved[-1]


def start_dit(dit: DiT, patches: Tensor) -> None:
    """Begin as the condition unchanged; `patches` (n, 64) are conditions' patches, for their components.

    A token's channels: 64 that hold noise - condition, which is the velocity; then components of the
    condition for the layers to read; last the anchor.
    """
    dim, eye = dit.config.dim, torch.eye(64)
    spare = dim - 64 - 1
    mean, base, deviation = _components(patches, min(spare, 64))
    weight = torch.zeros(dim, 4, 33)
    weight[:64, :, :16] = eye.view(64, 4, 16)
    weight[:64, :, 16:32] = -eye.view(64, 4, 16)
    read = base / deviation[:, None].clamp_min(0.1)
    weight[64 : 64 + len(read), :, 16:32] = read.view(-1, 4, 16)
    dit.vid_in.proj.weight.data = weight.flatten(1)
    bias = torch.zeros(dim)
    bias[64 : 64 + len(read)] = -(read @ mean)
    bias[-1] = ANCHOR
    dit.vid_in.proj.bias.data = bias
    dit.emb_in.proj_out.weight.data.zero_()
    dit.emb_in.proj_out.bias.data.zero_()
    rms = float(((ANCHOR**2 + 64 * 2 + len(read)) / dim) ** 0.5)
    for module in dit.modules():
        if isinstance(module, Modulation):
            for slot in ("attn", "mlp"):
                scale = torch.full((dim,), rms)
                scale[-1] = rms / ANCHOR  # a bias of 1
                scale[:64] = rms / 3  # mostly noise
                module.get_parameter(f"{slot}_scale").data = scale
                module.get_parameter(f"{slot}_gate").data.fill_(1.0)
    for name, parameter in dit.named_parameters():
        if ".proj_out." in name and name.startswith("blocks"):
            parameter.data.zero_()
    out = torch.zeros(64, dim)
    out[:, :64] = eye * rms
    dit.vid_out.proj.weight.data = out
    dit.vid_out.proj.bias.data.zero_()


def trainable(vae: VideoVAE) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights with masks, 0 where a path reads or writes a constant channel: there a small step is a leap."""
    masks = []
    for name, module in vae.named_modules():
        if not isinstance(module, CausalConv3d):
            continue
        assert module.bias is not None
        weight, bias = torch.ones_like(module.weight), torch.ones_like(module.bias)
        if not name.endswith("conv_out"):  # writes into the path
            width = module.out_channels
            if name.endswith("upscale_conv"):
                width = module.in_channels
            if not name.endswith("conv1"):
                for channel in _constants(width):
                    weight.view(-1, width, *weight.shape[1:])[:, channel] = 0
                    bias.view(-1, width)[:, channel] = 0
            if name.endswith(("conv_shortcut", "upscale_conv")) or "samplers" in name:
                weight[:, _constants(module.in_channels)] = 0
        masks += [(module.weight, weight), (module.bias, bias)]
    return masks
