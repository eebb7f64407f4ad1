"""SeedVR2's causal video VAE: 8x in space, 4x in time, 16 channels (SeedVR, arXiv:2501.01320).

A clip passes whole (`encode`, `decode`) or, with the same numbers, in slices of any length
(`encode_slice`, `decode_slice`) whose memory does not grow with the clip. Attribute names are the
checkpoint's tensor names. Knows nothing of files, of devices or of how the DiT scales latents; `SCALE`
is only written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from app.models.seedvr2.vae_config import VAEConfig
from app.nn.causal_conv import CausalConv3d, CausalState
from app.nn.norm import FrameGroupNorm

SCALE = 0.9152
"""The DiT's latents are the posterior mean times this; there is no shift."""

LOGVAR_RANGE = (-30.0, 20.0)
EPS = 1e-6


class VideoVAE(nn.Module):
    """The autoencoder, for inference: its weights take no gradients. Runs in their dtype, on their device."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.requires_grad_(False)  # activations are written in place

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior of a whole clip.

        x: (batch, in_channels, frames, height, width) in [-1, 1]; frames = temporal_factor * k + 1, height
        and width multiples of spatial_factor. Both results: (batch, latent_channels, k + 1,
        height / spatial_factor, width / spatial_factor), not scaled. ValueError for other sizes.
        """
        self.config.check_frames(x, self.config.in_channels, first=True)
        parameters: Tensor = self.encoder(x, None)
        mean, logvar = parameters.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """The clip of whole, unscaled latents: the shapes of `encode`, the other way; not clamped."""
        self.config.check_latents(z, self.config.latent_channels)
        x: Tensor = self.decoder(z, None)
        return x

    def new_state(self) -> CausalState:
        """The state of a clip that has not begun. Encoding and decoding may share one."""
        return CausalState()

    def encode_slice(self, x: Tensor, state: CausalState) -> Tensor:
        """Posterior mean of the next slice of a clip.

        x as for `encode`, but only the first slice has the extra frame: temporal_factor * k + 1 frames,
        later temporal_factor * k, k >= 1. Gives k + 1 latents, later k.
        """
        self.config.check_frames(x, self.config.in_channels, first=self.encoder.conv_in not in state)
        parameters: Tensor = self.encoder(x, state)
        return parameters[:, : self.config.latent_channels]

    def decode_slice(self, z: Tensor, state: CausalState) -> Tensor:
        """The frames of the next latents, one or more: the clip's first gives one frame, every other
        temporal_factor."""
        self.config.check_latents(z, self.config.latent_channels)
        x: Tensor = self.decoder(z, state)
        return x


class Encoder(nn.Module):
    """Frames to the parameters of the posterior, mean and log variance stacked in the channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0], padding=1)
        self.down_blocks = nn.ModuleList(DownBlock(config, stage) for stage in range(config.stages))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = FrameGroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, padding=1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        return self.parameters_of(self.features(x, state), state)

    def features(self, x: Tensor, state: CausalState | None) -> Tensor:
        """Frames to what the middle takes, at the size of latents: no layer sees far here."""
        x = self.conv_in(x, state)
        for layer in _layers(self.down_blocks):
            x = layer(x, state)
        return x

    def parameters_of(self, x: Tensor, state: CausalState | None) -> Tensor:
        """The rest, in which each position sees its whole frame."""
        for layer in self.mid_block.layers():
            x = layer(x, state)
        window = activated(x, self.conv_norm_out, self.conv_out)
        return self.conv_out.over(window, state)


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[-1], padding=1)
        self.mid_block = MidBlock(widths[-1], groups)
        self.up_blocks = nn.ModuleList(UpBlock(config, stage) for stage in range(config.stages))
        self.conv_norm_out = FrameGroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = CausalConv3d(widths[0], config.out_channels, padding=1)

    def forward(self, z: Tensor, state: CausalState | None) -> Tensor:
        return self.frames_of(self.features(z, state), state)

    def features(self, z: Tensor, state: CausalState | None) -> Tensor:
        """Latents to what the middle gives, in which each position has seen its whole frame."""
        x: Tensor = self.conv_in(z, state)
        for layer in self.mid_block.layers():
            x = layer(x, state)
        return x

    def frames_of(self, x: Tensor, state: CausalState | None) -> Tensor:
        """The rest, in which no layer sees far."""
        for layer in _layers(self.up_blocks):
            x = layer(x, state)
        window = activated(x, self.conv_norm_out, self.conv_out)
        del x
        return self.conv_out.over(window, state)


def _layers(blocks: Iterable[Any]) -> Iterator[nn.Module]:
    return (layer for block in blocks for layer in block.layers())


class DownBlock(nn.Module):
    """A stage of the encoder: residual blocks, then half the resolution except after the last stage."""

    def __init__(self, config: VAEConfig, stage: int) -> None:
        super().__init__()
        width, out = config.block_out_channels[max(stage - 1, 0)], config.block_out_channels[stage]
        self.resnets = resnets(width, out, config.layers_per_block, config.norm_num_groups)
        last = stage == config.stages - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out, config.downsamples_time(stage))])

    def layers(self) -> list[nn.Module]:
        """In order; each takes a clip and its state."""
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """A stage of the decoder: residual blocks, then twice the resolution except after the last stage."""

    def __init__(self, config: VAEConfig, stage: int) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        width, out = widths[max(stage - 1, 0)], widths[stage]
        self.resnets = resnets(width, out, config.layers_per_block + 1, config.norm_num_groups)
        last = stage == config.stages - 1
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out, config.upsamples_time(stage))])

    def layers(self) -> list[nn.Module]:
        """In order; each takes a clip and its state."""
        return [*self.resnets, *self.upsamplers]


class MidBlock(nn.Module):
    """A residual block, attention within each frame, a residual block."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(width, groups)])
        self.resnets = resnets(width, width, 2, groups)

    def layers(self) -> list[nn.Module]:
        """In order; each takes a clip and its state."""
        return [self.resnets[0], self.attentions[0], self.resnets[1]]


def resnets(width: int, out: int, count: int, groups: int) -> nn.ModuleList:
    """`count` residual blocks, the first of which changes the width."""
    return nn.ModuleList(ResnetBlock(out if i else width, out, groups) for i in range(count))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution of x where the width changes."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(groups, width, eps=EPS)
        self.conv1 = CausalConv3d(width, out, padding=1)
        self.norm2 = FrameGroupNorm(groups, out, eps=EPS)
        self.conv2 = CausalConv3d(out, out, padding=1)
        self.conv_shortcut = CausalConv3d(width, out, 1) if width != out else None

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        h = self.conv1.over(activated(x, self.norm1, self.conv1), state)
        window = activated(h, self.norm2, self.conv2)
        del h  # at full resolution each of these is the size of everything else together
        h = self.conv2.over(window, state)
        del window
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


def activated(x: Tensor, norm: FrameGroupNorm, conv: CausalConv3d) -> Tensor:
    """The window of `conv` that holds silu(norm(x)): written once, where the convolution reads it."""
    window = conv.window(x, *x.shape[2:])
    norm.silu(x, out=conv.own(window))
    return window


class FrameAttention(nn.Module):
    """Attention of one head over the positions of each frame, with a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = FrameGroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        """x: (batch, channels, frames, height, width). Frames do not see each other: `state` is not used."""
        batch, _, frames, height, width = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2).unsqueeze(1)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return x + out.view(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Half the height and width, and where `time` half the frames after the first, by a convolution."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        # Padded at the bottom and the right only, as in the image VAE that this one grew from.
        kernel, stride = ((3, 3, 3), (2, 2, 2)) if time else ((1, 3, 3), (1, 2, 2))
        self.conv = CausalConv3d(width, width, kernel, stride=stride, margin=1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        out: Tensor = self.conv(x, state)
        return out


class Upsample(nn.Module):
    """Twice the height and width, and where `time` twice the frames after the first.

    A 1x1x1 convolution gives each position its 2 x 2 (x 2) block, in channel order (x y z c): down, right,
    later, channel. A causal convolution follows.
    """

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.time = 2 if time else 1
        self.upscale_conv = CausalConv3d(width, width * 4 * self.time, 1)
        self.conv = CausalConv3d(width, width, padding=1)

    def forward(self, x: Tensor, state: CausalState | None) -> Tensor:
        batch, width, frames, height, across = x.shape
        # A clip's first latent stands for one frame, not two: its later half is dropped.
        start = state is None or self.conv not in state
        dropped = self.time - 1 if start else 0
        window = self.conv.window(x, frames * self.time - dropped, 2 * height, 2 * across)
        targets = iter(self.conv.own(window).unbind(2))
        for i in range(frames):
            blocks = self.upscale_conv(x[:, :, i : i + 1]).view(batch, 2, 2, self.time, width, height, across)
            for later in range(1 if start and i == 0 else self.time):
                target = next(targets).view(batch, width, height, 2, across, 2)
                target.copy_(blocks[:, :, :, later].permute(0, 3, 4, 1, 5, 2))
        return self.conv.over(window, state)
