"""Guidance against a case that is known in closed form: two Gaussians, of which one is wanted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from sfumato.audit.guidance import guided_denoiser, guided_output
from sfumato.audit.pipelines import PipelineModel
from sfumato.audit.target import GeneratorModel
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.sampling import Sampler

MEANS, SPREAD = torch.tensor([0.5, -0.4]), 0.1


def log_joint(x, sigma):
    """log p(x, c) + constant of images x [R, C, H, W] at noise sigma [R], for both classes: [R, 2]."""
    distance = (x[:, None] - MEANS.reshape(1, 2, 1, 1, 1)).square().sum((2, 3, 4))
    return -distance / (2 * (SPREAD**2 + sigma.reshape(-1, 1) ** 2))


def denoiser(x, sigma):
    """The exact denoiser of the even mixture of N(mean_c, SPREAD^2)."""
    weights = log_joint(x, sigma).softmax(1)
    mean = (weights @ MEANS).reshape(-1, 1, 1, 1)
    s = sigma.reshape(-1, 1, 1, 1)
    return (SPREAD**2 * x + s**2 * mean) / (SPREAD**2 + s**2)


def denoiser_of_class_0(x, sigma):
    s = sigma.reshape(-1, 1, 1, 1)
    return (SPREAD**2 * x + s**2 * MEANS[0]) / (SPREAD**2 + s**2)


def gradient(x, sigma, rows):
    """grad_x log p(c | x, sigma) with c = 0 for even rows and 1 for odd ones, by autograd."""
    x = x.requires_grad_()
    chosen = log_joint(x, sigma).log_softmax(1)[torch.arange(len(x)), torch.from_numpy(rows % 2)]
    return torch.autograd.grad(chosen.sum(), x)[0]


def never(x, sigma, rows):
    raise AssertionError("a gradient that weighs nothing was asked for")


class Exact(torch.nn.Module):
    """A network whose denoiser is `self.exact`, in the parametrisation of a scheduler or of EDM."""

    def __init__(self, kind, abar=None, sigma_data=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(sample_size=2, in_channels=1, time_embedding_type="positional")
        self.exact = denoiser
        self.kind, self.abar, self.sigma_data = kind, abar, sigma_data

    def forward(self, x, t, class_labels=None, return_dict=False):
        t = t.expand(len(x)) if t.ndim == 0 else t
        if self.abar is None:
            sigma = (4 * t).exp()
            s = sigma.reshape(-1, 1, 1, 1)
            total = (s**2 + self.sigma_data**2).sqrt()
            x = x * total
            sign = -1 if self.kind == "v_prediction" else 1
            skip = self.sigma_data**2 / total**2
            return (sign * (self.exact(x, sigma) - skip * x) * total / (s * self.sigma_data),)
        a = self.abar[t.long()].reshape(-1, 1, 1, 1)
        clean = self.exact(x / a.sqrt(), ((1 - a) / a).sqrt().flatten())
        eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * clean
        return ({"epsilon": eps, "sample": clean, "v_prediction": v}[self.kind],)


def ours(kind):
    network = Exact("epsilon", sigma_data=EDM().sigma_data)
    return GeneratorModel(Generator(network, ("all",), sampler=Sampler(kind=kind, steps=40)))


def pipeline(scheduler_class, kind, steps):
    edm = scheduler_class in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)
    scheduler = scheduler_class(prediction_type=kind)
    network = Exact(kind, sigma_data=0.5) if edm else Exact(kind, abar=scheduler.alphas_cumprod)
    return PipelineModel(network, scheduler, steps)


MODELS = {
    **{f"ours-{kind}": lambda kind=kind: ours(kind) for kind in ("heun", "ddim", "churn")},
    **{
        f"{scheduler.__name__}-{kind}": lambda scheduler=scheduler, kind=kind, steps=steps: pipeline(
            scheduler, kind, steps
        )
        for scheduler, kinds, steps in (
            (DDIMScheduler, ("epsilon", "sample", "v_prediction"), 50),
            (DDPMScheduler, ("epsilon", "sample", "v_prediction"), 250),
            (EDMEulerScheduler, ("epsilon", "v_prediction"), 50),
            (EDMDPMSolverMultistepScheduler, ("epsilon", "v_prediction"), 25),
        )
        for kind in kinds
    },
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_exact_posterior_at_scale_1_gives_the_conditional_distribution(model):
    images, _ = model().sample(520, seed=1, gradient=gradient, scale=1.0)
    values = images.astype(float) / 127.5 - 1
    for label, mean in enumerate(MEANS.tolist()):
        drawn = values[label::2]
        assert drawn.mean() == pytest.approx(mean, abs=0.02)
        assert drawn.std() == pytest.approx(SPREAD, rel=0.25)  # DDIM's 50 steps narrow it by a fifth


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_it_draws_the_very_images_that_the_conditional_denoiser_draws(model):
    """D + sigma^2 grad log p(c | x) is the denoiser of the class itself, so step by step all is the same."""
    model = model()
    guided, _ = model.sample(8, seed=2, gradient=lambda x, s, r: gradient(x, s, 0 * r), scale=1.0)
    plain, _ = model.sample(8, seed=2)
    model.network.exact = denoiser_of_class_0
    wanted, _ = model.sample(8, seed=2)
    assert np.abs(guided.astype(int) - wanted).max() <= 1
    assert np.abs(plain.astype(int) - wanted).max() > 20


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_without_guidance_both_classes_come_and_scale_0_changes_nothing(model):
    model = model()
    plain, _ = model.sample(300, seed=1)
    zero, _ = model.sample(300, seed=1, gradient=never, scale=0.0)
    assert np.array_equal(plain, zero)
    assert 0.35 < (plain.mean((1, 2, 3)) > 134).mean() < 0.65


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_in_vp_coordinates_it_is_dhariwal_and_nichols_algorithm_2(kind):
    model = pipeline(DDPMScheduler, kind, 10)
    abar = model.scheduler.alphas_cumprod[600]
    sigma = ((1 - abar) / abar).sqrt().repeat(4)
    x_t, rows, scale = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), np.arange(4), 2.5
    output = model.network(x_t, torch.tensor(600))[0]
    eps = Exact("epsilon", abar=model.scheduler.alphas_cumprod)(x_t, torch.tensor(600))[0]
    leaf = x_t.clone().requires_grad_()  # the gradient with respect to x_t itself
    log_p = log_joint(leaf / abar.sqrt(), sigma).log_softmax(1)[torch.arange(4), torch.arange(4) % 2]
    wanted = eps - scale * (1 - abar).sqrt() * torch.autograd.grad(log_p.sum(), leaf)[0]
    c_out = model._coefficients(sigma, x_t)[1]
    found = guided_output(output, c_out, gradient, scale, x_t / abar.sqrt(), sigma, rows)
    if kind == "sample":
        found = (x_t - abar.sqrt() * found) / (1 - abar).sqrt()
    if kind == "v_prediction":
        found = abar.sqrt() * found + (1 - abar).sqrt() * x_t
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_scale_multiplies_the_score():
    x, sigma = (
        torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.3, 1.0, 4.0]),
    )
    rows = np.array([4, 5, 9])
    guided = guided_denoiser(denoiser, rows, gradient, 3.0)(x, sigma)
    score = (denoiser(x, sigma) - x) / sigma.reshape(-1, 1, 1, 1) ** 2 + 3.0 * gradient(
        x.clone(), sigma, rows
    )
    torch.testing.assert_close(guided.detach(), (x + sigma.reshape(-1, 1, 1, 1) ** 2 * score).detach())


def test_samplers_run_without_autograd_and_the_gradient_with_it():
    seen = []

    def watched(x, sigma, rows):
        seen.append((torch.is_grad_enabled(), x.shape[0], rows.tolist(), float(sigma[0])))
        return gradient(x, sigma, rows)

    ours("heun").sample(3, gradient=watched, scale=0.5)
    assert all(enabled and n == 3 and rows == [0, 1, 2] for enabled, n, rows, _ in seen)
    assert len(seen) == 2 * 40 - 1  # both calls of every Heun step, one of the last


def test_a_gradient_that_overflows_does_not_spread():
    images, _ = ours("ddim").sample(2, gradient=lambda x, s, r: torch.full_like(x, float("nan")), scale=5.0)
    plain, _ = ours("ddim").sample(2)
    assert np.array_equal(images, plain)
