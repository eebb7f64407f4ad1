import pytest
import torch

from app.models.seedvr2.sampler import condition, guide, noised, sample, shift_timestep, timesteps


def test_timesteps_trail() -> None:
    assert timesteps(1) == [1000.0]
    assert timesteps(4) == [1000.0, 750.0, 500.0, 250.0]
    assert all(len(timesteps(n)) == n and timesteps(n)[-1] > 0 for n in range(1, 101))


def test_shift_is_one_at_the_smallest_and_grows() -> None:
    assert shift_timestep(100.0, 1, 32, 32) == pytest.approx(100.0)
    assert shift_timestep(100.0, 1, 128, 128) == pytest.approx(1000 * 3.2 * 0.1 / (1 + 2.2 * 0.1))
    assert shift_timestep(100.0, 37, 90, 160) == pytest.approx(1000 * 5 * 0.1 / (1 + 4 * 0.1))


def test_one_step_of_a_true_velocity_lands_on_the_clean_latent() -> None:
    clean, noise = torch.randn(2, 3, 4, 4, 16)
    for steps in (1, 2, 5):
        found = sample(noise, lambda x, t: noise - clean, None, timesteps(steps))
        torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)


def test_at_scale_one_the_negative_prompt_is_not_asked() -> None:
    def never(x: torch.Tensor, t: float) -> torch.Tensor:
        raise AssertionError

    sample(torch.randn(1, 2, 2, 16), lambda x, t: x, never, [1000.0], scale=1.0)


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\.0 needs the negative"):
        sample(torch.randn(1, 2, 2, 16), lambda x, t: x, None, [1000.0], scale=2.0)


def test_rescale_of_one_gives_each_token_the_positive_deviation() -> None:
    positive, negative = torch.randn(2, 2, 3, 4, 16)
    guided = guide(positive, negative, 7.5, 1.0)
    torch.testing.assert_close(guided.std(-1), positive.std(-1))
    torch.testing.assert_close(guide(positive, negative, 1.0, 0.0), positive)


def test_condition_is_the_latent_and_a_mask_of_ones() -> None:
    low = torch.randn(2, 4, 4, 16)
    made = condition(low)
    assert torch.equal(made[..., :16], low)
    assert torch.equal(made[..., 16:], torch.ones(2, 4, 4, 1))
    with pytest.raises(ValueError, match="no noise"):
        condition(low, noise_scale=0.1)
    noise = torch.randn_like(low)
    drowned = condition(low, noise, 1.0)[..., :16]
    torch.testing.assert_close(drowned, noised(low, noise, 1000.0))


def test_stopping_between_steps() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(torch.randn(1, 2, 2, 16), lambda x, t: x, None, timesteps(9), on_step=stop)
    assert len(calls) == 3
