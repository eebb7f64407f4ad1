"""What Stable Diffusion's VAE (diffusers' AutoencoderKL) and SeedVR2's, which grew out of it, have in common:
names of tensors, and how a configuration is read. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from app.errors import ConfigError

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]

# The names that the middle attention has in files of older software, sd-vae-ft-mse among them.
_OLD_ATTENTION_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def current_name(name: str) -> str:
    """A tensor's name as this module spells it, whatever software wrote it."""
    for old, new in _OLD_ATTENTION_NAMES.items():
        name = name.replace(old, new)
    return name


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many tensors there are whose names are `pattern` with 0, 1, ... in it."""
    found = 0
    while pattern.format(found) in shapes:
        found += 1
    return found


# ------------------------------------------------------------------ tensors, name by name


def middle(name: str, width: int, kernel: Shape, *, attention: bool = True) -> Tensors:
    """Two residual blocks, and attention between them."""
    yield from resnet(f"{name}.resnets.0", width, width, kernel)
    if attention:
        yield from vectors(f"{name}.attentions.0.group_norm", width)
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{name}.attentions.0.{linear}.weight", (width, width)
            yield f"{name}.attentions.0.{linear}.bias", (width,)
    yield from resnet(f"{name}.resnets.1", width, width, kernel)


def resnet(name: str, width: int, out: int, kernel: Shape) -> Tensors:
    """A residual block from `width` to `out` channels."""
    yield from vectors(f"{name}.norm1", width)
    yield from conv(f"{name}.conv1", width, out, kernel)
    yield from vectors(f"{name}.norm2", out)
    yield from conv(f"{name}.conv2", out, out, kernel)
    if width != out:
        yield from conv(f"{name}.conv_shortcut", width, out, (1,) * len(kernel))


def conv(name: str, width: int, out: int, kernel: Shape) -> Tensors:
    """A convolution."""
    yield f"{name}.weight", (out, width, *kernel)
    yield f"{name}.bias", (out,)


def vectors(name: str, width: int) -> Tensors:
    """A norm."""
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


# ------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Keys:
    """The keys of an original's configuration that are no parameters here.

    fixed: name the only architecture that there is; each value that stands for it.
    blocks: list the same type of block for each of block_out_channels.
    ignored: change no number. So do those that begin with an underscore.
    """

    fixed: Mapping[str, tuple[object, ...]]
    blocks: Mapping[str, str]
    ignored: frozenset[str]


def parameters(original: Mapping[str, Any], defaults: Any, keys: Keys, where: str) -> dict[str, Any]:
    """The parameters in an original's configuration. `defaults` is a dataclass of them all; `where` is named
    in messages.

    Raises:
        ConfigError: `vae_config_unsupported` or `vae_config_unknown`, naming the key and its value.
    """
    known = [field.name for field in fields(defaults)]
    widths = original.get("block_out_channels", defaults.block_out_channels)
    stages = len(widths) if isinstance(widths, list | tuple) else 0
    values = {}
    for key, value in original.items():
        if key in known:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in keys.fixed:
            if value not in keys.fixed[key]:
                raise bad_setting("unsupported", where, key, value, repr(keys.fixed[key][0]))
        elif kind := keys.blocks.get(key):
            if stages and value not in ([kind] * stages, (kind,) * stages):
                raise bad_setting("unsupported", where, key, value, f"{kind!r} for each stage")
        elif key not in keys.ignored and not key.startswith("_"):
            raise bad_setting("unknown", where, key, value, f"only keys such as {', '.join(sorted(known))}")
    return values


def bad_setting(code: str, where: str, key: str, value: object, expected: str) -> ConfigError:
    """The error `vae_config_...` of a setting."""
    shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
    return ConfigError(f"vae_config_{code}", f"{key} in {where} is {shown}; expected {expected}.")
