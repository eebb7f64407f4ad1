"""The two kinds of SeedVR2 transformer: their parameters and the tensors they consist of.

Torch-free, so that `check` can compare a checkpoint with what a model needs in milliseconds. It knows
nothing of files: shapes come in, a configuration or a list of names goes out.

SeedVR2 (Wang et al., 2025, arXiv:2506.05301) was published in two kinds, told apart by their tensors:
the 3B shares one set of weights between video and text after its first layers, gates its MLP and
rotates text with video; the 7B keeps the two apart throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

TIME_SINUSOIDS = 256  # width of the sinusoidal timestep embedding
GRID_WINDOWS = (4, 3, 3)  # windows along time, height, width of a 45 x 80 grid; not in the tensors
REGULAR = "720pwin_by_size_bysize"
SHIFTED = "720pswin_by_size_bysize"


@dataclass(frozen=True)
class DiTConfig:
    """Parameters of a SeedVR2 diffusion transformer.

    `windows` and `shifted` have one entry per layer. `separate` is the number of first layers that
    hold their own weights for video and text; the later ones share one set.
    """

    dim: int
    heads: int
    head_dim: int
    layers: int
    separate: int
    mlp: Literal["swiglu", "gelu"]
    rope: Literal["lang", "pixel"]
    rope_dim: int
    text_dim: int
    output_norm: bool
    last_video_only: bool
    windows: tuple[tuple[int, int, int], ...]
    shifted: tuple[bool, ...]
    in_channels: int = 33
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    expand_ratio: int = 4
    qk_bias: bool = False
    norm_eps: float = 1e-5

    @property
    def inner_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch_size)

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP; SwiGLU's is two thirds, rounded up to a multiple of 256."""
        if self.mlp == "gelu":
            return self.dim * self.expand_ratio
        return 256 * math.ceil(int(2 * self.dim * self.expand_ratio / 3) / 256)

    @property
    def rope_frequencies(self) -> int:
        """Number of rotary frequencies per axis."""
        return self.rope_dim // 3 // 2

    @classmethod
    def from_original(cls, original: Mapping[str, Any]) -> DiTConfig:
        """The configuration as the original's YAML files spell it.

        Raises:
            ValueError: The text and video widths differ, or a layer's kind is not known.
        """
        layers = original["num_layers"]
        if original["txt_dim"] != original["vid_dim"]:
            raise ValueError(f"txt_dim {original['txt_dim']} differs from vid_dim {original['vid_dim']}")
        unknown = {m for m in original["window_method"] if m not in (REGULAR, SHIFTED)}
        if unknown:
            raise ValueError(f"window_method {sorted(unknown)} is neither {REGULAR} nor {SHIFTED}")
        lang = original.get("rope_type") == "mmrope3d"
        return cls(
            dim=original["vid_dim"],
            heads=original["heads"],
            head_dim=original["head_dim"],
            layers=layers,
            separate=original.get("mm_layers", layers),
            mlp="swiglu" if original["mlp_type"] == "swiglu" else "gelu",
            rope="lang" if lang else "pixel",
            rope_dim=original["rope_dim"] if lang else original["head_dim"] // 2,
            text_dim=original["txt_in_dim"],
            output_norm=original.get("vid_out_norm") is not None,
            last_video_only=lang,
            windows=tuple(tuple(window) for window in original["window"]),
            shifted=tuple(method == SHIFTED for method in original["window_method"]),
            in_channels=original["vid_in_channels"],
            out_channels=original["vid_out_channels"],
            patch_size=tuple(original["patch_size"]),
            expand_ratio=original["expand_ratio"],
            qk_bias=original["qk_bias"],
            norm_eps=original["norm_eps"],
        )


def _alternating(layers: int) -> dict[str, Any]:
    return {
        "layers": layers,
        "windows": (GRID_WINDOWS,) * layers,
        "shifted": tuple(layer % 2 == 1 for layer in range(layers)),
    }


def config_3b(
    dim: int = 2560,
    heads: int = 20,
    layers: int = 32,
    separate: int = 10,
    text_dim: int = 5120,
    head_dim: int = 128,
) -> DiTConfig:
    """The 3B's kind; the defaults are the published model."""
    return DiTConfig(
        dim=dim, heads=heads, head_dim=head_dim, separate=separate, mlp="swiglu", rope="lang",
        rope_dim=head_dim, text_dim=text_dim, output_norm=True, last_video_only=True, **_alternating(layers),
    )  # fmt: skip


def config_7b(
    dim: int = 3072, heads: int = 24, layers: int = 36, text_dim: int = 5120, head_dim: int = 128
) -> DiTConfig:
    """The 7B's kind; the defaults are the published model."""
    return DiTConfig(
        dim=dim, heads=heads, head_dim=head_dim, separate=layers, mlp="gelu", rope="pixel",
        rope_dim=head_dim // 2, text_dim=text_dim, output_norm=False, last_video_only=False,
        **_alternating(layers),
    )  # fmt: skip


def branches(config: DiTConfig, layer: int, *, video_only: bool = False) -> Sequence[str]:
    """Which sets of weights a layer holds: ("vid", "txt"), ("all",), or ("vid",) for a module of the
    last layer that text does not pass through."""
    if layer >= config.separate:
        return ("all",)
    return ("vid",) if video_only else ("vid", "txt")


def dit_tensors(config: DiTConfig) -> dict[str, Shape]:
    """Every tensor of a checkpoint of this configuration: original name -> shape."""
    dim, patch = config.dim, config.patch_volume
    shapes: dict[str, Shape] = {
        "vid_in.proj.weight": (dim, config.in_channels * patch),
        "vid_in.proj.bias": (dim,),
        "emb_in.proj_in.weight": (dim, TIME_SINUSOIDS),
        "emb_in.proj_in.bias": (dim,),
        "emb_in.proj_hid.weight": (dim, dim),
        "emb_in.proj_hid.bias": (dim,),
        "emb_in.proj_out.weight": (6 * dim, dim),
        "emb_in.proj_out.bias": (6 * dim,),
        "vid_out.proj.weight": (config.out_channels * patch, dim),
        "vid_out.proj.bias": (config.out_channels * patch,),
    }
    if config.text_dim != dim:
        shapes |= {"txt_in.weight": (dim, config.text_dim), "txt_in.bias": (dim,)}
    if config.output_norm:
        shapes |= dict.fromkeys(
            ("vid_out_norm.weight", "vid_out_ada.out_shift", "vid_out_ada.out_scale"), (dim,)
        )
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        shapes |= {prefix + name: shape for name, shape in _block_tensors(config, layer).items()}
    return shapes


def _block_tensors(config: DiTConfig, layer: int) -> dict[str, Shape]:
    dim, inner, hidden = config.dim, config.inner_dim, config.mlp_dim
    shapes: dict[str, Shape] = {"attn.rope.rope.freqs": (config.rope_frequencies,)}
    for branch in branches(config, layer):
        shapes |= {
            f"attn.proj_qkv.{branch}.weight": (3 * inner, dim),
            f"attn.proj_out.{branch}.weight": (dim, inner),
            f"attn.proj_out.{branch}.bias": (dim,),
            f"attn.norm_q.{branch}.weight": (config.head_dim,),
            f"attn.norm_k.{branch}.weight": (config.head_dim,),
        }
        if config.qk_bias:
            shapes[f"attn.proj_qkv.{branch}.bias"] = (3 * inner,)
    video_only = config.last_video_only and layer == config.layers - 1
    for branch in branches(config, layer, video_only=video_only):
        shapes |= {
            f"mlp.{branch}.proj_in.weight": (hidden, dim),
            f"mlp.{branch}.proj_out.weight": (dim, hidden),
        }
        if config.mlp == "swiglu":
            shapes[f"mlp.{branch}.proj_in_gate.weight"] = (hidden, dim)
        else:
            shapes |= {f"mlp.{branch}.proj_in.bias": (hidden,), f"mlp.{branch}.proj_out.bias": (dim,)}
        for slot in ("attn", "mlp"):
            for part in ("shift", "scale", "gate"):
                shapes[f"ada.{branch}.{slot}_{part}"] = (dim,)
    return shapes


def recognise_dit(shapes: Shapes) -> DiTConfig:
    """The configuration of a checkpoint, from its tensors alone.

    Raises:
        ValueError: This is not a SeedVR2 transformer; the sentence says what it lacks.
    """
    layers = _count(shapes, "blocks.")
    for name in ("vid_in.proj.weight", "emb_in.proj_in.weight", "vid_out.proj.weight"):
        if name not in shapes or not layers:
            raise ValueError(
                f"it holds no {name if layers else 'blocks.0'}, as every SeedVR2 transformer does"
            )
    dim = shapes["vid_in.proj.weight"][0]
    head_dim = _first(shapes, "blocks.0.attn.norm_q.vid.weight", "blocks.0.attn.norm_q.all.weight")[0]
    qkv = _first(shapes, "blocks.0.attn.proj_qkv.vid.weight", "blocks.0.attn.proj_qkv.all.weight")[0]
    common = {
        "dim": dim,
        "heads": qkv // (3 * head_dim),
        "head_dim": head_dim,
        "layers": layers,
        "text_dim": shapes["txt_in.weight"][1] if "txt_in.weight" in shapes else dim,
    }
    if any(name.endswith("proj_in_gate.weight") for name in shapes):
        separate = sum(f"blocks.{i}.attn.proj_qkv.vid.weight" in shapes for i in range(layers))
        return config_3b(separate=separate, **common)
    return config_7b(**common)


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest N of the names `prefix` N `.…`."""
    numbers = (name[len(prefix) :].split(".", 1)[0] for name in shapes if name.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def _first(shapes: Shapes, *names: str) -> Shape:
    for name in names:
        if name in shapes:
            return shapes[name]
    raise ValueError(f"it holds neither of {', '.join(names)}, as every SeedVR2 transformer does")
