"""The tensors of the pose embedders, inside UniAnimate-DiT's checkpoint. Torch-free, for `check`.

The checkpoint also holds low-rank changes to the 14B's weights, which this project does not use.
"""

from __future__ import annotations

from app.models.wan.config import IMAGE_CHANNELS, POSE_DIM, Shape

WIDTH = 16
STEPS = ((1, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2))  # strides in time and space of the 3x3(x3) layers
PREFIXES = ("dwpose_embedding.", "randomref_embedding_pose.")


def pose_name(name: str) -> str | None:
    """The model's name of a tensor in the checkpoint; `None`: it is no pose embedder's."""
    for prefix in PREFIXES:
        _, found, rest = name.rpartition(prefix)
        if found:
            return prefix + rest
    return None


def pose_tensors() -> dict[str, Shape]:
    """Every tensor of the two embedders: original name -> shape."""
    shapes: dict[str, Shape] = {}
    last = 2 * (len(STEPS) - 1)
    for layer in range(len(STEPS)):
        channels = WIDTH if layer else 3
        reference = IMAGE_CHANNELS if 2 * layer == last else WIDTH
        for prefix, out, kernel in zip(PREFIXES, (WIDTH, reference), ((3, 3, 3), (3, 3)), strict=True):
            shapes[f"{prefix}{2 * layer}.weight"] = (out, channels, *kernel)
            shapes[f"{prefix}{2 * layer}.bias"] = (out,)
    shapes[f"{PREFIXES[0]}{last + 2}.weight"] = (POSE_DIM, WIDTH, 1, 2, 2)
    shapes[f"{PREFIXES[0]}{last + 2}.bias"] = (POSE_DIM,)
    return shapes
