"""Pipelines draw what stock diffusers draws, and denoise as its schedulers do."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    UNet2DModel,
)

from sfumato.audit import pipelines
from sfumato.audit.pipelines import PipelineModel
from sfumato.audit.target import GeneratorModel
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.errors import InputError

KINDS = ("epsilon", "sample", "v_prediction")


def tiny(channels=1, size=8, classes=None, out=None, **settings):
    torch.manual_seed(0)
    return (
        UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=out or channels, layers_per_block=1,
            block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=4,
            num_class_embeds=classes, **settings,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def stock(x):
    """What a pipeline's numpy output is as uint8: DiffusionPipeline.numpy_to_pil."""
    return (x * 255).round().astype("uint8")


def loop(network, scheduler, shape, steps, generator, labels=None):
    """Sampling with any diffusers scheduler, as its documentation writes it."""
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t, class_labels=labels).sample
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    return stock((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDIMScheduler)],
)
def test_unguided_images_are_the_stock_pipelines_bit_for_bit(
    monkeypatch, pipeline, scheduler, channels, kind
):
    monkeypatch.setattr(pipelines, "BATCH", 2)
    network, given = tiny(channels), scheduler(prediction_type=kind)
    made = pipeline(network, scheduler.from_config(given.config))
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    wanted = [
        made(batch_size=n, generator=generator, num_inference_steps=10, output_type="np").images
        for n in (2, 2, 1)
    ]
    images, labels = PipelineModel(network, given, 10).sample(5, seed=7)
    assert np.array_equal(images, stock(np.concatenate(wanted))) and labels is None
    assert images.std() > 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_schedulers_are_drawn_from_as_documented(scheduler, kind):
    network, given = tiny(), scheduler(prediction_type=kind, sigma_data=0.4)
    images, _ = PipelineModel(network, given, 12).sample(3, seed=3)
    shape, generator = (3, 1, 8, 8), torch.Generator().manual_seed(3)
    assert np.array_equal(images, loop(network, scheduler.from_config(given.config), shape, 12, generator))


def test_the_stochastic_solver_draws_its_noise_from_the_seed():
    given = EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", sigma_data=0.5)
    model = PipelineModel(tiny(), given, 8)
    first, again, other = (model.sample(2, seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EDMEulerScheduler])
def test_class_conditional_networks_get_their_labels(scheduler):
    network, given = tiny(classes=3), scheduler()
    model = PipelineModel(network, given, 6, ("0", "1", "2"))
    images, labels = model.sample(4, seed=1, labels=np.array([2, 0, 1, 2]))
    shape, generator = (4, 1, 8, 8), torch.Generator().manual_seed(1)
    same = scheduler.from_config(given.config)
    assert np.array_equal(images, loop(network, same, shape, 6, generator, torch.tensor([2, 0, 1, 2])))
    assert labels is not None and labels.tolist() == [2, 0, 1, 2]
    assert not np.array_equal(images, model.sample(4, seed=1, labels=[0, 0, 0, 0])[0])
    assert np.bincount(model.sample(7, seed=1)[1]).tolist() == [3, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_denoise_is_the_schedulers_estimate_of_the_clean_image(scheduler, kind):
    network, given = tiny(3), scheduler(prediction_type=kind, clip_sample=False)
    model = PipelineModel(network, given, 10)
    given.set_timesteps(1000)
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 1, 250, 999):
        abar = given.alphas_cumprod[t]
        sigma = ((1 - abar) / abar).sqrt().repeat(2)
        output = network(x_t, torch.tensor(t)).sample
        wanted = given.step(output, torch.tensor(t), x_t).pred_original_sample
        found = model.denoise(x_t / abar.sqrt(), sigma, None)
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_denoise_is_the_edm_schedulers_preconditioning(scheduler, kind):
    network, given = tiny(), scheduler(prediction_type=kind, sigma_data=0.4)
    model = PipelineModel(network, given, 10)
    x, sigma = 3 * torch.randn(4, 1, 8, 8), torch.tensor([0.002, 0.1, 2.0, 80.0])
    for row in range(4):
        noisy, level = x[row : row + 1], sigma[row]
        output = network(given.precondition_inputs(noisy, level), given.precondition_noise(level)).sample
        wanted = given.precondition_outputs(noisy, output, level)
        torch.testing.assert_close(model.denoise(x, sigma, None)[row : row + 1], wanted, rtol=1e-4, atol=1e-5)


def test_our_network_behind_diffusers_own_scheduler_is_the_same_denoiser():
    torch.manual_seed(1)
    network = unet("tiny", size=(8, 8), channels=1, num_labels=2).eval()
    ours = GeneratorModel(Generator(network, ("a", "b")))
    theirs = PipelineModel(network, EDMEulerScheduler(sigma_data=EDM().sigma_data), 10, ("0", "1", "2"))
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 30.0]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(ours.denoise(x, sigma, labels), theirs.denoise(x, sigma, labels))
    none = torch.full((3,), 2)
    assert torch.equal(ours.denoise(x, sigma, None), ours.denoise(x, sigma, none))


def test_between_timesteps_log_sigma_is_interpolated_and_beyond_them_t_stays():
    model = PipelineModel(tiny(), DDPMScheduler(), 10)
    abar = model.scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt()
    between = (sigmas[400] * sigmas[401]).sqrt()
    asked = torch.stack([sigmas[0] / 5, sigmas[0], sigmas[17], between, sigmas[999], sigmas[999] * 9]).float()
    found = model._timestep(asked)
    torch.testing.assert_close(found, torch.tensor([0, 0, 17, 400.5, 999, 999]), atol=1e-3, rtol=0)
    assert model.sigma_range == (float(sigmas[0]), float(sigmas[-1]))
    learned = PipelineModel(
        tiny(time_embedding_type="learned", num_train_timesteps=1000), DDPMScheduler(), 10
    )
    assert learned._timestep(asked[[0, 1, 2, 4, 5]]).tolist() == [0, 0, 17, 999, 999]
    assert learned._timestep(asked[3:4]).item() in (400, 401)
    assert learned.denoise(torch.zeros(6, 1, 8, 8), asked, None).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_denoise_is_differentiable_in_x(kind):
    model = PipelineModel(tiny(), DDIMScheduler(prediction_type=kind), 10)
    x = torch.randn(2, 1, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(model.denoise(x, torch.tensor([0.5, 3.0]), None).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().amax() > 0


def test_a_schedule_that_ends_in_pure_noise_is_finite_and_guided_elsewhere():
    given = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert given.alphas_cumprod[-1] == 0
    model, levels = PipelineModel(tiny(), given, 10), []

    def gradient(x, sigma, rows):
        levels.append(float(sigma[0]))
        return torch.ones_like(x) * 0.5 / (1 + float(sigma[0]) ** 2)  # as large as a true one can be

    guided, _ = model.sample(2, gradient=gradient, scale=1.0)
    assert len(levels) == 9 and np.isfinite(levels).all() and np.isfinite(model.sigma_range).all()
    assert guided.mean() > model.sample(2)[0].mean()


def test_a_learned_variance_is_kept_as_it_is():
    network = tiny(out=2)
    given = DDPMScheduler(variance_type="learned_range")
    model = PipelineModel(network, given, 5)
    made = DDPMPipeline(network, DDPMScheduler.from_config(given.config))
    made.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = made(batch_size=2, generator=generator, num_inference_steps=5, output_type="np").images
    assert np.array_equal(model.sample(2)[0], stock(wanted))
    pushed, _ = model.sample(2, gradient=lambda x, s, r: torch.ones_like(x), scale=0.1)
    assert pushed.mean() > model.sample(2)[0].mean()
    assert model.denoise(torch.zeros(2, 1, 8, 8), torch.ones(2), None).shape == (2, 1, 8, 8)


def test_rows_are_positions_in_the_whole_call(monkeypatch):
    monkeypatch.setattr(pipelines, "BATCH", 3)
    seen = []

    def gradient(x, sigma, rows):
        seen.append(rows.tolist())
        return torch.zeros_like(x)

    model = PipelineModel(tiny(), DDIMScheduler(), 2)
    images, _ = model.sample(7, gradient=gradient, scale=1.0)
    assert seen == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2 + [[6]] * 2
    assert np.array_equal(images, model.sample(7)[0])


def test_large_images_are_drawn_in_smaller_batches():
    model = PipelineModel(tiny(size=(256, 512)), DDIMScheduler(), 2)
    assert model.size == (256, 512) and model.batch == 7
    assert PipelineModel(tiny(), DDIMScheduler(), 2).batch == 250


def test_impossible_requests_are_refused():
    plain = PipelineModel(tiny(), DDIMScheduler(), 2)
    classes = PipelineModel(tiny(classes=2), DDIMScheduler(), 2, ("0", "1"))
    x, one = torch.zeros(1, 1, 8, 8), torch.ones(1)
    with pytest.raises(InputError, match="at least one"):
        plain.sample(0)
    with pytest.raises(InputError, match="has no labels"):
        plain.sample(1, labels=[0])
    with pytest.raises(InputError, match="has no labels"):
        plain.denoise(x, one, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="needs labels"):
        classes.denoise(x, one, None)
    for labels in ([0], [0, 2], [-1, 0]):
        with pytest.raises(InputError, match="2 class indices"):
            classes.sample(2, labels=labels)


def test_broken_weights_are_told():
    network = tiny()
    network.conv_out.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite numbers"):
        PipelineModel(network, DDIMScheduler(clip_sample=False), 2).sample(1)
