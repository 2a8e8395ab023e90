import pytest
import torch
from diffusers import EDMEulerScheduler

from sfumato.diffusion.sampling import Sampler, guided, noise_levels, sample
from sfumato.errors import InputError

DATA_STD = 0.7


def ideal(x, sigma):
    """The exact denoiser of N(0, DATA_STD^2) data."""
    s = sigma.reshape(-1, 1, 1, 1)
    return x * DATA_STD**2 / (DATA_STD**2 + s**2)


def curved(x, sigma):
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)))


def test_noise_levels_equal_diffusers():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    torch.testing.assert_close(
        noise_levels(Sampler(steps=18)).float(), scheduler.sigmas, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("denoise", [ideal, curved])
def test_ddim_equals_the_euler_scheduler_of_diffusers(denoise):
    sampler = Sampler(kind="ddim", steps=10)
    shape = (2, 1, 4, 4)
    ours = sample(denoise, shape, sampler, torch.Generator().manual_seed(3))
    scheduler = EDMEulerScheduler(sigma_min=sampler.sigma_min, sigma_max=sampler.sigma_max)
    scheduler.set_timesteps(sampler.steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * scheduler.sigmas[0]
    for i, timestep in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, timestep)
        clean = denoise(x, scheduler.sigmas[i].repeat(2))
        x = scheduler.step(clean, timestep, x, pred_original_sample=clean).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["heun", "ddim", "churn"])
def test_samples_of_an_ideal_denoiser_have_the_spread_of_the_data(kind):
    drawn = sample(ideal, (3000, 1, 2, 2), Sampler(kind=kind, steps=150), torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(DATA_STD, rel=0.06)


def test_heun_is_second_order_and_ddim_first_order():
    """Halving the step divides Heun's error by about four and DDIM's by about two."""

    def error(kind, steps):
        settings = {"sigma_min": 0.05, "sigma_max": 5.0, "rho": 3.0}
        x = sample(
            ideal, (8, 1, 2, 2), Sampler(kind=kind, steps=steps, **settings), torch.Generator().manual_seed(1)
        )
        start = torch.randn((8, 1, 2, 2), generator=torch.Generator().manual_seed(1)) * 5.0
        exact = start * DATA_STD / (DATA_STD**2 + 25.0) ** 0.5
        return (x - exact).norm().item()

    assert error("ddim", 32) / error("ddim", 64) == pytest.approx(2, rel=0.3)
    assert error("heun", 32) < error("ddim", 32) / 4


def test_guidance_extrapolates_from_no_label_to_label():
    with_label, without = (lambda x, s: x + 1), (lambda x, s: x)
    x, sigma = torch.zeros(1, 1, 1, 1), torch.ones(1)
    assert guided(with_label, without, 1.0) is with_label
    assert guided(with_label, without, 3.0)(x, sigma).item() == 3.0


def test_same_generator_seed_same_images():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(curved, (1, 1, 3, 3), Sampler(kind="churn", steps=5), generator)

    assert torch.equal(draw(4), draw(4)) and not torch.equal(draw(4), draw(5))


@pytest.mark.parametrize(
    "wrong", [{"kind": "ancestral"}, {"steps": 1}, {"sigma_min": 0.0}, {"sigma_max": 0.001}]
)
def test_unusable_settings_are_refused(wrong):
    with pytest.raises(InputError):
        Sampler(**wrong)
