"""The noise schedule of Wan, and noise that can be drawn again.

Rectified flow (Liu et al., 2022, arXiv:2209.03003): x_t = (1 - sigma) clean + sigma noise, and the model
predicts the flow noise - clean. Sigmas are moved towards noise by a shift (Esser et al., 2024,
arXiv:2403.03206, eq. 23). Numbers of the schedule live on the host; the original's are float32, and so are
these, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from app.nn.transfer import to_device

TRAINED_STEPS = 1000
SHIFT = 5.0
STEPS = (1000, 750, 500, 250)  # of the distilled model, before the shift

Noise = Callable[[int, int, tuple[int, ...]], Tensor]
"""(block, step, shape) -> standard normal float32; step 0 is what a block begins with."""


@dataclass(frozen=True)
class FlowMatch:
    """A shifted schedule of 1000 sigmas, from 1 down; zero is not among them."""

    shift: float = SHIFT

    @cached_property
    def sigmas(self) -> Tensor:
        """(1000,) float32."""
        even = torch.linspace(1.0, 0.0, TRAINED_STEPS + 1)[:-1]
        return self.shift * even / (1 + (self.shift - 1) * even)

    @cached_property
    def timesteps(self) -> Tensor:
        """(1000,) float32, in (0, 1000]."""
        return self.sigmas * TRAINED_STEPS

    def warped(self, steps: Sequence[int] = STEPS) -> tuple[float, ...]:
        """Timesteps of the schedule at evenly spaced steps in [0, 1000]: 1000, 750, 500, 250 become 1000,
        937.5, 833.333, 625 at a shift of 5. Float32, never rounded to integers.

        Raises:
            ValueError: A step is outside [0, 1000].
        """
        if not all(0 <= step <= TRAINED_STEPS for step in steps):
            raise ValueError(f"steps {tuple(steps)}, expected each in 0 to {TRAINED_STEPS}")
        with_zero = [*self.timesteps.tolist(), 0.0]
        return tuple(with_zero[TRAINED_STEPS - step] for step in steps)

    def sigma(self, timestep: float) -> float:
        """The sigma of the nearest of the 1000 timesteps: that of 0 is 0.00498 at a shift of 5."""
        nearest = (self.timesteps.double() - timestep).abs().argmin()
        return float(self.sigmas[nearest])


def clean(x: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """The clean latents that a flow points to, x - sigma flow, computed in float64. Returns float32."""
    if x.device.type == "mps":  # has no float64
        return clean(x.cpu(), flow.cpu(), sigma).to(x.device)
    return (x.double() - sigma * flow.double()).float()


def noised(x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x_t of the flow between clean latents and noise, float32."""
    return (1 - sigma) * x + sigma * noise


@dataclass(frozen=True)
class SeededNoise:
    """Noise addressed by seed, block and step: whoever asks for an address, in whatever order, on whatever
    device, gets the same numbers. Drawn on the CPU (Philox; Salmon et al., 2011).

    `seed`: 0 to 2^64 - 1.
    """

    seed: int
    device: torch.device | str = "cpu"

    def __call__(self, block: int, step: int, shape: tuple[int, ...]) -> Tensor:
        counter = np.array([0, 0, step, block], dtype=np.uint64)
        key = np.array([self.seed, 0], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        drawn = generator.standard_normal(shape, dtype=np.float32)
        return to_device(torch.from_numpy(drawn), self.device)
