"""Sampling of SeedVR2: conditions, timesteps, guidance and Euler steps, as pure functions.

Rectified flow (Liu et al., 2022, arXiv:2209.03003): x_t = (1 - t/1000) clean + (t/1000) noise; the model
predicts the velocity noise - clean. All latents are (frames, height, width, channels), float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

T = 1000.0

Model = Callable[[Tensor, float], Tensor]  # (noised latent, timestep) -> velocity


def timesteps(steps: int) -> list[float]:
    """`steps` timesteps from 1000 down, evenly spaced, zero left out ("trailing"; Lin et al., 2023,
    arXiv:2305.08891). Rounded to float32, as the model was evaluated with."""
    return [float(torch.tensor(T * (1 - i / steps), dtype=torch.float32)) for i in range(steps)]


def shift_timestep(timestep: float, frames: int, height: int, width: int) -> float:
    """Timestep moved by the size of a clip of latents, as SeedVR2 does where it noises a condition.

    The shift (Esser et al., 2024, arXiv:2403.03206, eq. 23) is linear in the number of pixels: 1 at
    256x256 to 3.2 at 1024x1024 for an image, 1 at 256x256x37 to 5 at 1280x720x145 for a clip.
    """
    pixels = height * 8 * width * 8
    if frames > 1:
        volume = pixels * ((frames - 1) * 4 + 1)
        shift = _line(volume, 256 * 256 * 37, 1.0, 1280 * 720 * 145, 5.0)
    else:
        shift = _line(pixels, 256 * 256, 1.0, 1024 * 1024, 3.2)
    t = timestep / T
    return T * shift * t / (1 + (shift - 1) * t)


def _line(x: float, x1: float, y1: float, x2: float, y2: float) -> float:
    return y1 + (x - x1) * (y2 - y1) / (x2 - x1)


def noised(clean: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """x_t of the flow between `clean` (t = 0) and `noise` (t = 1000)."""
    return torch.lerp(clean, noise, timestep / T)


def condition(low: Tensor, noise: Tensor | None = None, noise_scale: float = 0.0) -> Tensor:
    """The condition of a restoration: the low-quality latent and a mask of ones.

    Args:
        low: (T, H, W, 16), scaled latents.
        noise: As `low`; needed where `noise_scale` is above 0.
        noise_scale: In [0, 1]: how much of the condition is drowned in noise.

    Returns:
        (T, H, W, 17).
    """
    if noise_scale > 0:
        if noise is None:
            raise ValueError("noise_scale is above 0, and there is no noise")
        frames, height, width, _ = low.shape
        low = noised(low, noise, shift_timestep(noise_scale * T, frames, height, width))
    return torch.cat([low, torch.ones_like(low[..., :1])], dim=-1)


def guide(positive: Tensor, negative: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598) of two velocities.

    `rescale` in [0, 1] moves each token's deviation over its channels back towards the positive
    prediction's (arXiv:2305.08891, section 3.4).
    """
    guided = negative + scale * (positive - negative)
    if rescale != 0.0:
        factor = positive.std(dim=-1, keepdim=True) / guided.std(dim=-1, keepdim=True)
        guided = guided * (rescale * factor + (1 - rescale))
    return guided


def sample(
    noise: Tensor,
    positive: Model,
    negative: Model | None,
    schedule: Sequence[float],
    scale: float = 1.0,
    rescale: float = 0.0,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Euler steps from noise to a clean latent.

    Args:
        noise: (T, H, W, 16), standard normal.
        positive: The model under the positive prompt.
        negative: The model under the negative prompt; not called, and may be `None`, at scale 1.
        schedule: Descending timesteps in (0, 1000], see `timesteps`.
        scale: Guidance scale.
        rescale: Guidance rescale.
        on_step: Called before each step; may raise to stop.

    Returns:
        (T, H, W, 16).
    """
    x = noise
    for t, s in zip(schedule, [*schedule[1:], 0.0], strict=True):
        on_step()
        velocity = positive(x, t)
        if scale != 1.0:
            if negative is None:
                raise ValueError(f"guidance scale {scale} needs the negative prompt")
            velocity = guide(velocity, negative(x, t), scale, rescale)
        x = x + velocity * ((s - t) / T)
    return x
