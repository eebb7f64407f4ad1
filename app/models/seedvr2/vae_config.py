"""The shape of SeedVR2's causal video VAE: its parameters and the tensors they imply.

Torch-free, so that a checkpoint can be recognised and checked without loading a framework. Knows
nothing of files, of the computation (`vae.py`) or of the factor that scales latents for the DiT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import ConfigError
from app.models.autoencoder_kl import Keys, Shape, Tensors, conv, count, middle, parameters, resnet, vectors
from app.nn.causal_sizes import CausalSizes

_KERNEL = (3, 3, 3)
_FIXED: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention": (True,),
    "time_receptive_field": ("full",),
    "use_quant_conv": (False,),
    "use_post_quant_conv": (False,),
    "slicing_up_num": (0,),
}
# How the original was trained, initialised, sliced or scaled. It computes nothing from the two factors
# either, so they may contradict the stages.
_MEANINGLESS = frozenset(
    {
        "inflation_mode",
        "slicing_sample_min_size",
        "gradient_checkpoint",
        "freeze_encoder",
        "sample_size",
        "scaling_factor",
        "force_upcast",
        "spatial_downsample_factor",
        "temporal_downsample_factor",
    }
)
_BLOCKS = {"down_block_types": "DownEncoderBlock3D", "up_block_types": "UpDecoderBlock3D"}
KEYS = Keys(_FIXED, _BLOCKS, _MEANINGLESS)


@dataclass(frozen=True)
class VAEConfig(CausalSizes):
    """Parameters of the VAE, in the original's names.

    block_out_channels: channels of each resolution, finest first; every step but the last halves height
        and width.
    layers_per_block: residual blocks of an encoder stage; a decoder stage has one more.
    norm_num_groups: groups of every GroupNorm; divides every width.
    temporal_scale_num: how many of the halvings, the coarsest ones, also halve time.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    latent_channels: int = 16
    temporal_scale_num: int = 2
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ConfigError(
                    "vae_config_invalid",
                    f"block_out_channels of the VAE holds {width}, which norm_num_groups = "
                    f"{self.norm_num_groups} does not divide; give widths that are multiples of it.",
                )
        if not 0 <= self.temporal_scale_num < len(self.block_out_channels):
            raise ConfigError(
                "vae_config_invalid",
                f"temporal_scale_num of the VAE is {self.temporal_scale_num}; with {self.stages} stages it "
                f"must be from 0 to {self.stages - 1}.",
            )

    @classmethod
    def published(cls) -> VAEConfig:
        """The configuration of the released `ema_vae.pth` (s8_c16_t4)."""
        return cls()

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> VAEConfig:
        """Read the original's configuration. Raises ConfigError for a setting that names another model."""
        values = parameters(original, cls(), KEYS, "the VAE's configuration")
        # The original asks each halving whether it is among the last so many: more than there are is all.
        halvings = len(values.get("block_out_channels", cls.block_out_channels)) - 1
        time = min(values.pop("temporal_scale_num", cls.temporal_scale_num), halvings)
        return cls(**values, temporal_scale_num=time)

    @property
    def stages(self) -> int:
        """Resolutions of the encoder, and of the decoder."""
        return len(self.block_out_channels)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width (8 as published)."""
        return int(2 ** (self.stages - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per latent, after the first (4 as published)."""
        return int(2**self.temporal_scale_num)

    def downsamples_time(self, stage: int) -> bool:
        """Whether the encoder's stage (0 = finest) halves time as it halves space."""
        return self.stages - 1 - self.temporal_scale_num <= stage < self.stages - 1

    def upsamples_time(self, stage: int) -> bool:
        """Whether the decoder's stage (0 = coarsest) doubles time as it doubles space."""
        return stage < self.temporal_scale_num


def vae_tensors(config: VAEConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the checkpoint, in the original's names."""
    return dict([*_encoder(config), *_decoder(config)])


def _encoder(config: VAEConfig) -> Tensors:
    widths = config.block_out_channels
    yield from conv("encoder.conv_in", config.in_channels, widths[0], _KERNEL)
    width = widths[0]
    for stage, stage_width in enumerate(widths):
        block = f"encoder.down_blocks.{stage}"
        for layer in range(config.layers_per_block):
            yield from resnet(f"{block}.resnets.{layer}", width, stage_width, _KERNEL)
            width = stage_width
        if stage < config.stages - 1:
            time = 3 if config.downsamples_time(stage) else 1
            yield from conv(f"{block}.downsamplers.0.conv", width, width, (time, 3, 3))
    yield from middle("encoder.mid_block", width, _KERNEL)
    yield from vectors("encoder.conv_norm_out", width)
    yield from conv("encoder.conv_out", width, 2 * config.latent_channels, _KERNEL)


def _decoder(config: VAEConfig) -> Tensors:
    widths = config.block_out_channels[::-1]
    yield from conv("decoder.conv_in", config.latent_channels, widths[0], _KERNEL)
    yield from middle("decoder.mid_block", widths[0], _KERNEL)
    width = widths[0]
    for stage, stage_width in enumerate(widths):
        block = f"decoder.up_blocks.{stage}"
        for layer in range(config.layers_per_block + 1):
            yield from resnet(f"{block}.resnets.{layer}", width, stage_width, _KERNEL)
            width = stage_width
        if stage < config.stages - 1:
            upscale = 8 if config.upsamples_time(stage) else 4
            yield from conv(f"{block}.upsamplers.0.upscale_conv", width, width * upscale, (1, 1, 1))
            yield from conv(f"{block}.upsamplers.0.conv", width, width, _KERNEL)
    yield from vectors("decoder.conv_norm_out", width)
    yield from conv("decoder.conv_out", width, config.out_channels, _KERNEL)


def recognise_vae(shapes: Mapping[str, Shape], norm_num_groups: int = 32) -> VAEConfig:
    """The configuration of a checkpoint, from its tensors' names and shapes alone.

    The number of groups leaves no trace in the tensors: every SeedVR2 VAE has 32, another is the
    caller's knowledge. Raises ConfigError where the tensors are not those of such a VAE; that all of
    them are there is for `vae_tensors` to check.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ConfigError(
                "vae_not_recognised",
                f"The file holds {len(shapes)} tensors but not {name!r}, which every SeedVR2 VAE has; give "
                "the VAE's own checkpoint (ema_vae.pth).",
            )
        return tuple(shapes[name])

    stages = count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    down = [shape(f"encoder.down_blocks.{i}.downsamplers.0.conv.weight") for i in range(max(stages, 1) - 1)]
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(max(stages, 1))]
    return VAEConfig(
        block_out_channels=tuple(widths),
        layers_per_block=count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        norm_num_groups=norm_num_groups,
        latent_channels=shape("decoder.conv_in.weight")[1],
        temporal_scale_num=sum(kernel[2] == 3 for kernel in down),
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
    )
