"""Apple's Metal devices (MPS), which lack some operations: which errors say so, and the way to the CPU."""

from __future__ import annotations

import torch

from app.models.latents.codec import Codec


def device_of(codec: Codec) -> torch.device:
    """Where its weights are."""
    return next(codec.module.parameters()).device


def place_of(codec: Codec) -> str:
    """Device and type of its weights, for a person: "cuda:0, float16"."""
    weight = next(codec.module.parameters())
    return f"{weight.device}, {str(weight.dtype).removeprefix('torch.')}"


def lacks_operation(device: torch.device, error: Exception) -> bool:
    """Whether an error says that Metal cannot do something that the CPU can: an operation ("The operator
    'aten::...' is not currently implemented for the MPS device"), or a type of numbers."""
    text = str(error)
    return (
        device.type == "mps"
        and isinstance(error, NotImplementedError | RuntimeError | TypeError)
        and "MPS" in text
        and "out of memory" not in text
    )


def moved_to_cpu(codec: Codec, error: Exception) -> str:
    """Move the codec's weights to the CPU; gives what to tell a person."""
    torch.nn.Module.to(codec.module, "cpu", torch.float32)
    reason = str(error).splitlines()[0].rstrip(".")[:200]
    return f"The Metal device cannot run this codec ({reason}); it ran on the CPU instead."
