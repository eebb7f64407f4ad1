import numpy as np
import pytest
import torch
from torch import Tensor

from app.models.wan.unipc import sample, steps


def curved(x: Tensor, timestep: float) -> Tensor:
    """A flow that is no straight line."""
    return torch.tanh(x) * (0.5 + timestep / 1000) + 0.3 * torch.sin(3 * x)


@pytest.mark.parametrize("shift", [5.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 50])
def test_steps_and_latents_equal_diffusers(count: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: no peer to compare with")
    peer = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    # The sigmas of the original; those of diffusers itself begin at 1, not at 0.999.
    peer.set_timesteps(sigmas=np.linspace(np.float32(0.999), 0, count + 1)[:-1])
    ours = steps(count, shift)
    assert ours.timesteps == tuple(peer.timesteps.tolist())
    assert ours.sigmas == pytest.approx(peer.sigmas.tolist(), rel=1e-5)
    noise = torch.randn(1, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    x = noise
    for timestep in peer.timesteps:
        x = peer.step(curved(x, timestep.item()), timestep, x).prev_sample
    found = sample(noise, curved, ours)
    assert ((found - x).norm() / x.norm()) < 2e-5


def test_a_straight_flow_is_exact_in_any_number_of_steps() -> None:
    clean, noise = torch.randn(2, 1, 4, 3, 5)
    for count in (1, 2, 7):
        schedule = steps(count)
        start = (1 - schedule.sigmas[0]) * clean + schedule.sigmas[0] * noise
        found = sample(start, lambda x, t: noise - clean, schedule)
        torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-5)


def test_timesteps_are_whole_and_sigmas_are_not_rounded() -> None:
    schedule = steps()
    assert len(schedule.timesteps) == 50
    assert schedule.timesteps[:3] == (999.0, 995.0, 991.0)
    assert schedule.sigmas[-1] == 0
    assert schedule.sigmas[1] == pytest.approx(0.9957324, abs=1e-7)


def test_no_step_is_refused_and_a_step_can_stop() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        steps(0)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(torch.randn(1, 2, 2), curved, steps(9), stop)
    assert len(calls) == 3
