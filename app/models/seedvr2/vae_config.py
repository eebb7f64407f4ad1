"""The shape of SeedVR2's causal video VAE: its parameters and the tensors they imply.

Torch-free, so that a checkpoint can be recognised and checked without loading a framework. Knows
nothing of files, of the computation (`vae.py`) or of the factor that scales latents for the DiT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import ConfigError
from app.nn.causal_sizes import CausalSizes

Shape = tuple[int, ...]

# Settings of the original that name the only architecture it has; any other value is another model.
_FIXED: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention": (True,),
    "time_receptive_field": ("full",),
    "use_quant_conv": (False,),
    "use_post_quant_conv": (False,),
    "slicing_up_num": (0,),
}
# Settings that change no number: how the original was trained, initialised, sliced or scaled. It computes
# nothing from the two factors either, so they may contradict the stages.
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
# One entry a stage, always the same one.
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock3D", "up_block_types": "UpDecoderBlock3D"}

# The names that the middle attention had in files written by older software.
_OLD_ATTENTION_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


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
        _check_original(original, known=cls.__dataclass_fields__)
        values = {key: value for key, value in original.items() if key in cls.__dataclass_fields__}
        if "block_out_channels" in values:
            values["block_out_channels"] = tuple(values["block_out_channels"])
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


def _check_original(original: Mapping[str, Any], known: Collection[str]) -> None:
    stages = len(original.get("block_out_channels", VAEConfig.block_out_channels))
    for key, value in original.items():
        if key in _FIXED and value not in _FIXED[key]:
            expected: object = _FIXED[key][0]
        elif key in _BLOCK_TYPES and list(value) != [_BLOCK_TYPES[key]] * stages:
            expected = [_BLOCK_TYPES[key]] * stages
        elif key in known or key in _FIXED or key in _BLOCK_TYPES or key in _MEANINGLESS:
            continue
        else:
            raise ConfigError(
                "vae_config_unknown",
                f"The VAE's configuration holds the unknown key {key!r} (value {value!r}); remove it or use "
                f"one of {', '.join(known)}.",
            )
        raise ConfigError(
            "vae_config_unsupported",
            f"{key} of the VAE is {value!r}; a SeedVR2 VAE of {stages} stages has {expected!r}.",
        )


def current_name(name: str) -> str:
    """A tensor's name as `vae_tensors` spells it: older files name the middle attention's otherwise."""
    for old, new in _OLD_ATTENTION_NAMES.items():
        name = name.replace(old, new)
    return name


def vae_tensors(config: VAEConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the checkpoint, in the original's names."""
    return dict([*_encoder(config), *_decoder(config)])


_Tensors = Iterator[tuple[str, Shape]]


def _encoder(config: VAEConfig) -> _Tensors:
    widths = config.block_out_channels
    yield from _conv("encoder.conv_in", config.in_channels, widths[0])
    width = widths[0]
    for stage, stage_width in enumerate(widths):
        block = f"encoder.down_blocks.{stage}"
        for layer in range(config.layers_per_block):
            yield from _resnet(f"{block}.resnets.{layer}", width, stage_width)
            width = stage_width
        if stage < config.stages - 1:
            time = 3 if config.downsamples_time(stage) else 1
            yield from _conv(f"{block}.downsamplers.0.conv", width, width, (time, 3, 3))
    yield from _middle("encoder.mid_block", width)
    yield from _vectors("encoder.conv_norm_out", width)
    yield from _conv("encoder.conv_out", width, 2 * config.latent_channels)


def _decoder(config: VAEConfig) -> _Tensors:
    widths = config.block_out_channels[::-1]
    yield from _conv("decoder.conv_in", config.latent_channels, widths[0])
    yield from _middle("decoder.mid_block", widths[0])
    width = widths[0]
    for stage, stage_width in enumerate(widths):
        block = f"decoder.up_blocks.{stage}"
        for layer in range(config.layers_per_block + 1):
            yield from _resnet(f"{block}.resnets.{layer}", width, stage_width)
            width = stage_width
        if stage < config.stages - 1:
            upscale = 8 if config.upsamples_time(stage) else 4
            yield from _conv(f"{block}.upsamplers.0.upscale_conv", width, width * upscale, (1, 1, 1))
            yield from _conv(f"{block}.upsamplers.0.conv", width, width)
    yield from _vectors("decoder.conv_norm_out", width)
    yield from _conv("decoder.conv_out", width, config.out_channels)


def _middle(name: str, width: int) -> _Tensors:
    yield from _resnet(f"{name}.resnets.0", width, width)
    yield from _vectors(f"{name}.attentions.0.group_norm", width)
    for linear in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.attentions.0.{linear}.weight", (width, width)
        yield f"{name}.attentions.0.{linear}.bias", (width,)
    yield from _resnet(f"{name}.resnets.1", width, width)


def _resnet(name: str, width: int, out: int) -> _Tensors:
    yield from _vectors(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out)
    yield from _vectors(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if width != out:
        yield from _conv(f"{name}.conv_shortcut", width, out, (1, 1, 1))


def _conv(name: str, width: int, out: int, kernel: Shape = (3, 3, 3)) -> _Tensors:
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def _vectors(name: str, width: int) -> _Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


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

    stages = _count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    down = [shape(f"encoder.down_blocks.{i}.downsamplers.0.conv.weight") for i in range(max(stages, 1) - 1)]
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(max(stages, 1))]
    return VAEConfig(
        block_out_channels=tuple(widths),
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        norm_num_groups=norm_num_groups,
        latent_channels=shape("decoder.conv_in.weight")[1],
        temporal_scale_num=sum(kernel[2] == 3 for kernel in down),
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
    )


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count
