"""UMT5 text encoders: their sizes, and the tensors of their checkpoints. Torch-free, for `check`.

Names are those of the original `.pth` (models_t5_umt5-xxl-enc-bf16.pth), which the module keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class UMT5Config:
    """Sizes of an encoder; the defaults are UMT5-XXL's. `vocab` counts the rows of the embedding table,
    which may be more than the tokenizer has pieces."""

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    hidden_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32  # of relative distance, half of them for each direction

    def __post_init__(self) -> None:
        if self.attention_dim % self.heads:
            raise ValueError(f"attention_dim {self.attention_dim} is not a multiple of {self.heads} heads")

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> UMT5Config:
        """The configuration as the original's keyword arguments spell it.

        Raises:
            ValueError: The layers share one table of positions, as T5's do and UMT5's do not.
        """
        if original.get("shared_pos", False):
            raise ValueError("shared_pos is true: that is T5; UMT5 has a table of positions in each layer")
        return cls(
            vocab=original["vocab_size"],
            dim=original["dim"],
            attention_dim=original["dim_attn"],
            hidden_dim=original["dim_ffn"],
            heads=original["num_heads"],
            layers=original["encoder_layers"],
            buckets=original["num_buckets"],
        )


UMT5_XXL = UMT5Config()
UMT5_NANO = UMT5Config(
    vocab=768, dim=64, attention_dim=64, hidden_dim=160, heads=4, layers=2
)  # its tokenizer has fewer pieces, as the published one


def umt5_tensors(config: UMT5Config) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this configuration: original name -> shape."""
    dim, inner, hidden = config.dim, config.attention_dim, config.hidden_dim
    shapes: dict[str, Shape] = {"token_embedding.weight": (config.vocab, dim), "norm.weight": (dim,)}
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        shapes |= {
            f"{prefix}norm1.weight": (dim,),
            f"{prefix}attn.q.weight": (inner, dim),
            f"{prefix}attn.k.weight": (inner, dim),
            f"{prefix}attn.v.weight": (inner, dim),
            f"{prefix}attn.o.weight": (dim, inner),
            f"{prefix}norm2.weight": (dim,),
            f"{prefix}ffn.gate.0.weight": (hidden, dim),
            f"{prefix}ffn.fc1.weight": (hidden, dim),
            f"{prefix}ffn.fc2.weight": (dim, hidden),
            f"{prefix}pos_embedding.embedding.weight": (config.buckets, config.heads),
        }
    return shapes


def recognise_umt5(shapes: Mapping[str, Shape]) -> UMT5Config:
    """The configuration of a checkpoint, from its tensors alone.

    Raises:
        ValueError: This is not a UMT5 encoder in the original names; the sentence says what it lacks.
    """
    first = "blocks.0."
    marks = {
        "token_embedding.weight": 2,
        f"{first}attn.q.weight": 2,
        f"{first}ffn.fc1.weight": 2,
        f"{first}pos_embedding.embedding.weight": 2,
    }
    for name, dimensions in marks.items():
        if len(shapes.get(name, ())) != dimensions:
            raise ValueError(f"it holds no matrix {name}, as every UMT5 encoder in Wan's names does")
    vocab, dim = shapes["token_embedding.weight"]
    buckets, heads = shapes[f"{first}pos_embedding.embedding.weight"]
    inner = shapes[f"{first}attn.q.weight"][0]
    if not heads or inner % heads:
        raise ValueError(f"its attention is {inner} wide, which {heads} heads cannot share")
    numbers = (name.split(".")[1] for name in shapes if name.startswith("blocks."))
    return UMT5Config(
        vocab=vocab,
        dim=dim,
        attention_dim=inner,
        hidden_dim=shapes[f"{first}ffn.fc1.weight"][0],
        heads=heads,
        layers=1 + max(int(number) for number in numbers if number.isdigit()),
        buckets=buckets,
    )
