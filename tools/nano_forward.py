"""The passes of nano's SeedVR2 with gradients and in batches, over the product's own modules.

The product's passes write in place to keep memory flat, which gradients do not survive. These compute the
same numbers plainly; tests hold the two together. Knows nothing of training.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.models.seedvr2.dit import Attention, Block, DiT, Plan
from app.models.seedvr2.vae import (
    Decoder,
    Downsample,
    Encoder,
    FrameAttention,
    ResnetBlock,
    Upsample,
    VideoVAE,
)
from app.models.seedvr2.windows import Partition
from app.nn.causal_conv import CausalConv3d

# ---------------------------------------------------------------- autoencoder


def encode(vae: VideoVAE, x: Tensor) -> Tensor:
    """Posterior mean, not scaled: (batch, 3, frames, height, width) in [-1, 1] -> (batch, 16, ...)."""
    return _through(vae.encoder, x)[:, : vae.config.latent_channels]


def decode(vae: VideoVAE, z: Tensor) -> Tensor:
    """Clips of unscaled latents."""
    return _through(vae.decoder, z)


def trunk(half: Encoder | Decoder, x: Tensor) -> Tensor:
    """All of it but the last normalisation and convolution."""
    x = _conv(half.conv_in, x)
    blocks = (
        (*half.down_blocks, half.mid_block)
        if isinstance(half, Encoder)
        else (half.mid_block, *half.up_blocks)
    )
    for block in blocks:
        for layer in block.layers():
            x = _layer(layer, x)
    return x


def features(half: Encoder | Decoder, x: Tensor) -> Tensor:
    """What `conv_out` sees."""
    return F.silu(_norm(half.conv_norm_out, trunk(half, x)))


def _through(half: Encoder | Decoder, x: Tensor) -> Tensor:
    return _conv(half.conv_out, features(half, x))


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, ResnetBlock):
        h = _conv(layer.conv1, F.silu(_norm(layer.norm1, x)))
        h = _conv(layer.conv2, F.silu(_norm(layer.norm2, h)))
        return h + (x if layer.conv_shortcut is None else _conv(layer.conv_shortcut, x))
    if isinstance(layer, FrameAttention):
        return _attention(layer, x)
    if isinstance(layer, Downsample):
        return _conv(layer.conv, x)
    return _upsample(cast(Upsample, layer), x)


def _conv(conv: CausalConv3d, x: Tensor) -> Tensor:
    if conv.past:
        x = torch.cat([x[:, :, :1].expand(-1, -1, conv.past, -1, -1), x], dim=2)
    if conv.margin:
        x = F.pad(x, (0, conv.margin, 0, conv.margin))
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, conv.border)


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    batch, _, frames, height, across = x.shape
    grouped = x.reshape(batch, norm.num_groups, -1, frames, height, across)
    variance, mean = torch.var_mean(grouped, (2, 4, 5), keepdim=True, correction=0)
    normed = ((grouped - mean) * (variance + norm.eps).rsqrt()).view(x.shape)
    return normed * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)


def _attention(layer: FrameAttention, x: Tensor) -> Tensor:
    batch, _, frames, height, width = x.shape
    tokens = _norm(layer.group_norm, x).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2).unsqueeze(1)
    out = layer.to_out[0](
        F.scaled_dot_product_attention(layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens))
    )
    return x + cast(Tensor, out).view(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    batch, width, frames, height, across = x.shape
    blocks = _conv(layer.upscale_conv, x).reshape(batch, 2, 2, layer.time, width, frames, height, across)
    x = blocks.permute(0, 4, 5, 3, 6, 1, 7, 2).reshape(
        batch, width, frames * layer.time, 2 * height, 2 * across
    )
    # A clip's first latent stands for one frame: what would be later is dropped.
    return _conv(layer.conv, torch.cat([x[:, :, :1], x[:, :, layer.time :]], 2))


# ---------------------------------------------------------------- transformer


def velocity(dit: DiT, vid: Tensor, prompt: Tensor, timestep: float, plan: Plan) -> Tensor:
    """As `DiT.forward`, of a batch: (batch, T, H, W, 33) -> (batch, T, H, W, 16). Patches of 1 x 2 x 2."""
    batch, frames, height, width, channels = vid.shape
    time = dit.emb_in(timestep)
    txt = dit.txt_in(prompt).expand(batch, -1, -1)
    patches = vid.view(batch, frames, height // 2, 2, width // 2, 2, channels).permute(0, 1, 2, 4, 3, 5, 6)
    x = dit.vid_in(patches.reshape(batch, -1, 4 * channels))
    for block, windows, move in zip(dit.blocks, plan.partitions, plan.moves, strict=False):
        x, txt = _block(cast(Block, block), x if move is None else x[:, move], txt, time, plan, windows)
    if plan.moves[-1] is not None:
        x = x[:, plan.moves[-1]]
    x = _rms(x, dit.vid_out_norm.weight, dit.config.norm_eps)
    x = dit.vid_out(dit.vid_out_ada(x.clone(), time))
    out = x.view(batch, frames, height // 2, width // 2, 2, 2, -1).permute(0, 1, 2, 4, 3, 5, 6)
    return cast(Tensor, out.reshape(batch, frames, height, width, -1))


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normed if weight is None else normed * weight


def _block(
    block: Block, vid: Tensor, txt: Tensor, time: Tensor, plan: Plan, windows: Partition
) -> tuple[Tensor, Tensor]:
    eps = block.config.norm_eps
    shift, scale, gate = block.ada.video("attn", time[0])
    attended, text = _joint(
        block.attn, _rms(vid, scale, eps) + shift, _text_in(block, txt, time), plan, windows
    )
    vid = vid + attended * gate
    shift, scale, gate = block.ada.video("mlp", time[1])
    vid = vid + _mlp(block.mlp.video, _rms(vid, scale, eps) + shift) * gate
    if text is not None:
        txt = txt + text * block.ada.text("attn", time[0])[2]
        shift, scale, gate = block.ada.text("mlp", time[1])
        txt = txt + _mlp(block.mlp.text, _rms(txt, scale, eps) + shift) * gate
    return vid, txt


def _text_in(block: Block, txt: Tensor, time: Tensor) -> Tensor:
    if not block.text_modulated:
        return _rms(txt, None, block.config.norm_eps)
    shift, scale, _ = block.ada.text("attn", time[0])
    return cast(Tensor, _rms(txt, scale, block.config.norm_eps) + shift)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = (mlp.get_submodule(name) for name in ("proj_in_gate", "proj_in", "proj_out"))
    return cast(Tensor, down(F.silu(gate(x)) * up(x)))


def _joint(
    attn: Attention, vid: Tensor, txt: Tensor, plan: Plan, windows: Partition
) -> tuple[Tensor, Tensor | None]:
    """Video (batch, tokens, D) in window order and text (batch, L, D), both through windowed attention."""
    batch, length = len(vid), txt.shape[1]
    heads = (3, attn.config.heads, attn.config.head_dim)
    text = _heads(attn, attn.proj_qkv.text(txt).view(batch, length, *heads), "text", plan.text_rotations)
    qkv = attn.proj_qkv.video(vid).view(batch, -1, *heads)
    outs, text_sum = [], torch.zeros(())
    for group in windows.groups:
        part = qkv[:, group.start : group.stop].reshape(batch * group.count, group.length, *heads)
        video = _heads(attn, part, "video", plan.rotations[group.shape])
        q, k, v = (
            torch.cat([x, t.repeat_interleave(group.count, 0)], 2) for x, t in zip(video, text, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q if attn.text_leaves else video[0], k, v)
        mixed = mixed.transpose(1, 2).flatten(2)
        outs.append(mixed[:, : group.length].reshape(batch, group.tokens, -1))
        if attn.text_leaves:
            text_sum = text_sum + mixed[:, group.length :].view(batch, group.count, length, -1).sum(1)
    out = attn.proj_out.video(torch.cat(outs, 1))
    return out, attn.proj_out.text(text_sum / windows.count) if attn.text_leaves else None


def _heads(
    attn: Attention, qkv: Tensor, kind: str, rotations: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(windows, length, 3, h, d) -> q, k, v, (windows, h, length, d); q and k normed and turned."""
    eps = attn.config.norm_eps
    q, k = (
        _turned(_rms(qkv[:, :, i], cast(Tensor, getattr(norm, kind).weight), eps), rotations)
        for i, norm in enumerate((attn.norm_q, attn.norm_k))
    )
    return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


def _turned(x: Tensor, rotations: Tensor | None) -> Tensor:
    """Pairs of channels of (windows, length, h, d) turned by (length, d / 2)."""
    if rotations is None:
        return x
    cos, sin = rotations.real[:, None], rotations.imag[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
