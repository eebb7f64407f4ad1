"""UniPC, a predictor-corrector for few, large steps (Zhao et al., 2023, arXiv:2302.04867), on a flow.

Second order, B(h) = e^h - 1, on predictions of the clean latents, as undistilled Wan is sampled. Coefficients
are numbers of the host; latents only meet them in sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.models.wan.schedule import SHIFT, TRAINED_STEPS

Flow = Callable[[Tensor, float], Tensor]  # (noised latents, timestep) -> flow


@dataclass(frozen=True)
class Steps:
    """Sigmas from noise down to 0 (one more than steps), and the timestep of each step."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def steps(count: int = 50, shift: float = SHIFT) -> Steps:
    """`count` steps as undistilled Wan takes them. The model was evaluated with whole timesteps: they, and
    not the sigmas, are truncated.

    Raises:
        ValueError: No step.
    """
    if count < 1:
        raise ValueError(f"{count} steps, expected at least 1")
    largest = float(np.float32(1 - 1 / TRAINED_STEPS))
    even = np.linspace(largest, 0.0, count + 1)[:-1]
    sigmas = shift * even / (1 + (shift - 1) * even)
    timesteps = (sigmas * TRAINED_STEPS).astype(np.int64)
    return Steps((*sigmas.astype(np.float32).tolist(), 0.0), tuple(map(float, timesteps)))


@dataclass(frozen=True)
class _Past:
    """A step that was taken: log signal-to-noise ratio, latents, and the prediction of the clean ones."""

    ratio: float
    latents: Tensor
    clean: Tensor


def sample(noise: Tensor, flow: Flow, schedule: Steps, on_step: Callable[[], None] = lambda: None) -> Tensor:
    """Clean latents from noise.

    Args:
        noise: Standard normal, float32, any shape.
        flow: The model, under guidance where there is some.
        on_step: Called before each step; may raise to stop.

    Returns:
        As `noise`, float32.
    """
    x = noise
    count = len(schedule.timesteps)
    past: list[_Past] = []
    order = 0
    for i, (timestep, sigma) in enumerate(zip(schedule.timesteps, schedule.sigmas, strict=False)):
        on_step()
        clean = x - sigma * flow(x, timestep).float()
        if past:
            x = _correct(past, clean, sigma, schedule.sigmas[i - 1], order)
        past = [*past[-1:], _Past(_ratio(sigma), x, clean)]
        order = min(2, count - i, i + 1)
        x = _predict(past, schedule.sigmas[i + 1], sigma, order)
    return x


def _ratio(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio: lambda in the paper."""
    return math.log(1 - sigma) - math.log(sigma)


def _predict(past: list[_Past], sigma: float, before: float, order: int) -> Tensor:
    """UniP: latents at `sigma` from those at `before`, the last of `past`."""
    last = past[-1]
    if sigma == 0:
        return last.clean
    h = _ratio(sigma) - last.ratio
    grown = math.expm1(-h)
    x = (sigma / before) * last.latents - (1 - sigma) * grown * last.clean
    if order == 2:
        x = x - (1 - sigma) * grown * 0.5 * _slope(past, h)
    return x


def _correct(past: list[_Past], clean: Tensor, sigma: float, before: float, order: int) -> Tensor:
    """UniC: the same step again, knowing the prediction `clean` at its end."""
    last = past[-1]
    h = _ratio(sigma) - last.ratio
    grown = math.expm1(-h)
    x = (sigma / before) * last.latents - (1 - sigma) * grown * last.clean
    if order == 1:
        return x - (1 - sigma) * grown * 0.5 * (clean - last.clean)
    # Weights that make the step exact to second order: [[1, 1], [r, 1]] rho = b.
    r = (past[-2].ratio - last.ratio) / h
    phi_2 = grown / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / grown, 2 * phi_3 / grown
    rho_1 = (b_1 - b_2) / (1 - r)
    rho_2 = b_1 - rho_1
    return x - (1 - sigma) * grown * (rho_1 * _slope(past, h) + rho_2 * (clean - last.clean))


def _slope(past: list[_Past], h: float) -> Tensor:
    """How the prediction changed over the step before the last, at the pace of a step of h."""
    r = (past[-2].ratio - past[-1].ratio) / h
    return torch.div(past[-2].clean - past[-1].clean, r)
