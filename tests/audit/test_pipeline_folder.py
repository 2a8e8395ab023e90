"""Diffusers pipeline folders: what stock diffusers saves is opened, everything else is refused in one line."""

import json
import shutil

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
    PNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from sfumato.audit.pipeline_folder import open_pipeline
from sfumato.errors import InputError


def tiny(channels=1, size=8, **settings):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(4, 4), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=2, add_attention=False, **settings,
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """`saved(pipeline, scheduler, **unet)`: a folder that stock diffusers wrote."""

    def save(pipeline=DDPMPipeline, scheduler=None, **unet):
        pipeline(tiny(**unet), scheduler or DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
        return tmp_path / "pipeline"

    return save


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in (content | changes).items() if value is not None})
    )


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "name", "steps"),
    [
        (DDPMPipeline, DDPMScheduler(num_train_timesteps=1000), "DDPMScheduler", 250),
        (DDPMPipeline, DDPMScheduler(num_train_timesteps=100), "DDPMScheduler", 100),
        (DDPMPipeline, DDIMScheduler(), "DDIMScheduler", 50),
        (DDIMPipeline, DDIMScheduler(num_train_timesteps=20), "DDIMScheduler", 20),
        (DDPMPipeline, EDMEulerScheduler(sigma_data=0.3), "EDMEulerScheduler", 50),
        (DDPMPipeline, EDMDPMSolverMultistepScheduler(), "EDMDPMSolverMultistepScheduler", 50),
    ],
)
def test_what_diffusers_saves_is_opened(saved, pipeline, scheduler, name, steps):
    description, model = open_pipeline(saved(pipeline, scheduler, channels=3))
    assert type(model.scheduler).__name__ == name and model.steps == steps
    assert description.startswith(f"diffusers {pipeline.__name__}, 8 x 8 RGB, {name} of {steps} steps")
    assert model.scheduler.config.get("sigma_data") == scheduler.config.get("sigma_data")
    assert model.num_labels is None and model.device.type == "cpu"
    assert not any(p.requires_grad for p in model.network.parameters())


def test_the_opened_pipeline_draws_the_stock_images(saved):
    folder = saved(
        DDIMPipeline, DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    )
    stock = DDIMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    wanted = stock(batch_size=3, generator=generator, num_inference_steps=7, output_type="np").images
    images, _ = open_pipeline(folder, steps=7)[1].sample(3, seed=4)
    assert np.array_equal(images, (wanted * 255).round().astype("uint8"))


def test_a_ddim_pipeline_saved_with_the_ddpm_scheduler_draws_with_ddim(saved):
    folder = saved(DDPMPipeline)
    edit(folder / "model_index.json", _class_name="DDIMPipeline")
    _, model = open_pipeline(folder)
    assert type(model.scheduler).__name__ == "DDIMScheduler" and model.steps == 50


def test_parts_may_lie_in_the_folder_itself(saved):
    folder = saved()
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder)
        (folder / part).rmdir()
    assert open_pipeline(folder)[1].size == (8, 8)


def test_classes_and_oblong_images(saved):
    description, model = open_pipeline(saved(size=(8, 16), num_class_embeds=4))
    assert model.size == (8, 16) and model.num_labels == 4 and model.label_names == ("0", "1", "2", "3")
    assert "8 x 16 grey, 4 classes" in description
    images, labels = model.sample(4)
    assert images.shape == (4, 8, 16, 1) and labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIP"]}, "conditioned on text"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "conditioned on text"),
        ({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "latents of an autoencoder"),
        ({"_class_name": "ConsistencyModelPipeline"}, "ConsistencyModelPipeline is not supported"),
        ({"_class_name": ["my_code", "MyPipeline"]}, "is not supported"),
        ({"unet": ["my_code", "UNet2DModel"]}, "is not supported"),
        ({"scheduler": ["diffusers", "PNDMScheduler"]}, "PNDMScheduler is not supported"),
        ({"scheduler": ["my_code", "DDPMScheduler"]}, "None is not supported"),
    ],
)  # fmt: skip
def test_other_pipelines_are_refused_with_what_works(saved, index, says):
    folder = saved()
    edit(folder / "model_index.json", **index)
    with pytest.raises(InputError, match=says) as refused:
        open_pipeline(folder)
    assert "folder of its images" in str(refused.value) and "\n" not in str(refused.value)


def test_what_pndm_saves_is_refused(saved):
    with pytest.raises(InputError, match="PNDMScheduler is not supported"):
        open_pipeline(saved(scheduler=PNDMScheduler()))


def drop_a_weight(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f / "unet"), "complete"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json cannot be read"),
        (lambda f: (f / "unet" / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk"), "cannot be loaded"),
        (lambda f: (f / "model_index.json").write_text("{"), "not JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "holds no settings"),
        (drop_a_weight, "do not fit"),
        (lambda f: edit(f / "unet" / "config.json", block_out_channels=[8, 8]), "do not fit|cannot be loaded"),
        (lambda f: edit(f / "unet" / "config.json", down_block_types=["Nothing", "Nothing"]), "cannot be loaded"),
        (lambda f: edit(f / "unet" / "config.json", sample_size=None), "sample_size"),
        (lambda f: edit(f / "unet" / "config.json", sample_size=7), "does not run"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule="odd"), "scheduler cannot be made"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="odd"), "prediction_type odd"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", variance_type="learned"), "gives 1 channels for 1"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(saved, damage, says):
    folder = saved()
    damage(folder)
    with pytest.raises(InputError, match=says) as refused:
        open_pipeline(folder)
    assert "\n" not in str(refused.value) and "nothing was audited" in str(refused.value)
    assert str(folder) in str(refused.value)


def test_channels_classes_and_steps_that_cannot_be_audited(saved):
    with pytest.raises(InputError, match="4 channels"):
        open_pipeline(saved(channels=4))
    with pytest.raises(InputError, match="type timestep"):
        open_pipeline(saved(class_embed_type="timestep"))
    folder = saved(scheduler=DDPMScheduler(num_train_timesteps=30))
    for steps in (1, 31):
        with pytest.raises(InputError, match="at least 2 and at most 30"):
            open_pipeline(folder, steps=steps)
    with pytest.raises(InputError, match="do not fit"):
        open_pipeline(
            saved(scheduler=EDMEulerScheduler(), time_embedding_type="learned", num_train_timesteps=9)
        )
