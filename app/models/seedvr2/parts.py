"""What the files of a SeedVR2 model must hold. Torch-free, for `check`.

Parts: `dit` and `vae`, and the prompt embeddings `positive` and `negative`, one tensor each.
"""

from __future__ import annotations

from app.boot.tensorfile import TensorIndex, compare_tensors, rename_tensors
from app.errors import ConfigError
from app.models.autoencoder_kl import current_name
from app.models.seedvr2.config import DiTConfig, Shapes, dit_tensors, recognise_dit
from app.models.seedvr2.vae_config import VAEConfig, recognise_vae, vae_tensors
from app.models.seedvr2.variants import VARIANTS, Variant

PARTS = ("dit", "vae", "positive", "negative")
MAX_TOKENS = 512  # of a prompt embedding; the published ones have 58 and 64
FLOATS = ("F64", "F32", "F16", "BF16")
# Other tools' files carry the two prompt embeddings along; ours are files of their own.
DROPPED = ("positive_conditioning", "negative_conditioning")


def variant(name: str) -> Variant:
    """The variant a manifest names.

    Raises:
        ConfigError: `model_variant_unknown`.
    """
    if name not in VARIANTS:
        raise ConfigError(
            "model_variant_unknown",
            f"variant {name!r} of family seedvr2 is not known; the manifest may name {', '.join(VARIANTS)}, "
            "or none, and then the tensors decide.",
        )
    return VARIANTS[name]


def contents(variant_name: str | None, part: str, index: TensorIndex) -> list[str]:
    """How the tensors of a part's file differ from what the model needs, in sentences; [] is right."""
    if part == "dit":
        return _dit(variant_name, index)
    if part == "vae":
        return _vae(variant_name, rename_tensors(index, current_name))
    return _prompt(variant_name, index)


def shapes_of(index: TensorIndex) -> Shapes:
    """name -> shape, without the tensors that are dropped."""
    return {name: entry.shape for name, entry in index.tensors.items() if name not in DROPPED}


def dit_config(variant_name: str | None, index: TensorIndex) -> DiTConfig:
    """The transformer that a file must hold: the variant's, or the one that its tensors tell of."""
    return variant(variant_name).dit if variant_name else recognise_dit(shapes_of(index))


def vae_config(variant_name: str | None, index: TensorIndex) -> VAEConfig:
    """The VAE that a file must hold: the variant's, or the one that its tensors tell of."""
    return variant(variant_name).vae if variant_name else recognise_vae(shapes_of(index))


def _dit(variant_name: str | None, index: TensorIndex) -> list[str]:
    try:
        found = recognise_dit(shapes_of(index))
    except ValueError as error:
        return [f"This is not a SeedVR2 transformer: {error}."]
    wanted = variant(variant_name).dit if variant_name else found
    wrong = compare_tensors(dit_tensors(wanted), index, dropped=DROPPED)
    if wrong and _looks(found) != _looks(wanted):
        return [f"Its tensors are those of {_looks(found)}, expected {_looks(wanted)}.", *wrong]
    return wrong


def _looks(config: DiTConfig) -> str:
    kind = "3B's kind (SwiGLU, shared layers)" if config.mlp == "swiglu" else "7B's kind (GELU)"
    return f"a transformer of the {kind}, {config.layers} layers of width {config.dim}"


def _vae(variant_name: str | None, index: TensorIndex) -> list[str]:
    try:
        wanted = vae_config(variant_name, index)
    except (ValueError, ConfigError) as error:
        return [f"This is not a SeedVR2 VAE: {str(error).rstrip('.')}."]
    return compare_tensors(vae_tensors(wanted), index)


def _prompt(variant_name: str | None, index: TensorIndex) -> list[str]:
    if len(index.tensors) != 1:
        return [f"It holds {len(index.tensors)} tensors, expected one: the embedding of a prompt."]
    (entry,) = index.tensors.values()
    shape = entry.shape[1:] if len(entry.shape) == 3 and entry.shape[0] == 1 else entry.shape
    width = variant(variant_name).dit.text_dim if variant_name else None
    held = f"{'x'.join(map(str, entry.shape)) or 'a scalar'} {entry.dtype}"
    if len(shape) != 2 or shape[1] < 1 or (width is not None and shape[1] != width):
        return [f"Its tensor is {held}, expected (tokens)x{width or '(width)'}."]
    if not 1 <= shape[0] <= MAX_TOKENS:
        return [f"Its tensor is {held}, expected 1 to {MAX_TOKENS} tokens."]
    if entry.dtype not in FLOATS:
        return [f"Its tensor is {held}, expected one of {', '.join(FLOATS)}."]
    return []
