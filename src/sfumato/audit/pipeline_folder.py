"""A diffusers pipeline folder, read as data: weights from safetensors, settings from JSON.

Networks and schedulers are those of the installed diffusers; no code of the folder runs, no pickle is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sfumato.audit.pipelines import EDM_SCHEDULERS, PipelineModel
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import in_words

INDEX_FILE = "model_index.json"
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
VARIANCE_PRESERVING = ("DDPMScheduler", "DDIMScheduler")
DEFAULT_STEPS, MOST_DDPM_STEPS = 50, 250
WORKS = (
    "pixel pipelines of a UNet2DModel (DDPMPipeline, DDIMPipeline) with a DDPM, DDIM, EDMEuler or "
    "EDMDPMSolverMultistep scheduler can be audited; of any other model give a folder of its images"
)


def open_pipeline(folder: Path, *, steps: int | None = None) -> tuple[str, PipelineModel]:
    """The pipeline in a folder with `model_index.json`, on the CPU, with one phrase that describes it.

    steps: of the scheduler; by default 50, and for DDPM all that it was trained with, at most 250.

    Raises:
        InputError: another kind of pipeline, an incomplete folder, or a network that does not run.
    """
    index = _json(folder / INDEX_FILE)
    name = index.get("_class_name")
    unet_kind, scheduler_kind = _kind(index.get("unet")), _kind(index.get("scheduler"))
    if name not in PIPELINES or unet_kind != "UNet2DModel":
        if (
            any(part in index for part in ("text_encoder", "tokenizer"))
            or unet_kind == "UNet2DConditionModel"
        ):
            what = "is conditioned on text"
        elif any(part in index for part in ("vae", "vqvae")):
            what = "works in the latents of an autoencoder"
        else:
            what = "is not supported"
        raise InputError(f"{folder}: its pipeline {name} {what}; nothing was audited; {WORKS}")
    if scheduler_kind not in VARIANCE_PRESERVING + EDM_SCHEDULERS:
        raise InputError(
            f"{folder}: its scheduler {scheduler_kind} is not supported; nothing was audited; {WORKS}"
        )
    network = _load_network(folder)
    scheduler = _load_scheduler(folder, scheduler_kind, ddim=name == "DDIMPipeline")
    model = PipelineModel(network, scheduler, _steps(scheduler, steps, folder), _label_names(network, folder))
    _check(model, folder)
    classes = f", {model.num_labels} classes" if model.num_labels else ""
    shape = in_words((*model.size, model.channels))
    return f"diffusers {name}, {shape}{classes}, {type(scheduler).__name__} of {model.steps} steps", model


def _load_network(folder: Path) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from safetensors import SafetensorError

    part = _part(folder, "unet")
    _json(part / "config.json")
    if not any(part.glob("*.safetensors")):
        raise _incomplete(folder, f"{part / 'diffusion_pytorch_model.safetensors'} is missing")
    load: Any = UNet2DModel.from_pretrained
    try:
        network, info = load(
            part,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        NotImplementedError,
        SafetensorError,
    ) as error:
        raise _incomplete(folder, f"its network cannot be loaded ({_line(error)})") from error
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if lacking:
        raise _incomplete(folder, f"its weights do not fit its network ({lacking[0]})")
    return network.eval().requires_grad_(False)


def _load_scheduler(folder: Path, kind: str, *, ddim: bool) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    config = _json(_part(folder, "scheduler") / "scheduler_config.json")
    built: Any = {
        "DDPMScheduler": DDIMScheduler if ddim else DDPMScheduler,  # as DDIMPipeline does
        "DDIMScheduler": DDIMScheduler,
        "EDMEulerScheduler": EDMEulerScheduler,
        "EDMDPMSolverMultistepScheduler": EDMDPMSolverMultistepScheduler,
    }[kind]
    try:
        return built.from_config(config)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise _incomplete(folder, f"its scheduler cannot be made ({_line(error)})") from error


def _label_names(network: Any, folder: Path) -> tuple[str, ...] | None:
    if network.config.class_embed_type is not None:
        kind = network.config.class_embed_type
        raise InputError(f"{folder}: its class embedding is of type {kind}; nothing was audited; {WORKS}")
    count = network.config.num_class_embeds
    return None if count is None else tuple(str(label) for label in range(count))


def _steps(scheduler: Any, steps: int | None, folder: Path) -> int:
    trained = int(scheduler.config.num_train_timesteps)
    edm = type(scheduler).__name__ in EDM_SCHEDULERS
    if steps is None:
        ddpm = type(scheduler).__name__ == "DDPMScheduler"
        steps = (
            min(trained, MOST_DDPM_STEPS) if ddpm else DEFAULT_STEPS if edm else min(trained, DEFAULT_STEPS)
        )
    if steps < 2 or (not edm and steps > trained):
        most = "" if edm else f" and at most {trained}"
        raise InputError(
            f"{folder}: {steps} sampling steps cannot be used, at least 2{most}; nothing was audited"
        )
    return steps


def _check(model: PipelineModel, folder: Path) -> None:
    """Refuse what cannot work, by its settings and by one call of the network."""
    config, settings = model.network.config, model.scheduler.config
    if config.in_channels not in (1, 3):
        raise InputError(
            f"{folder}: its images have {config.in_channels} channels, and only 1 (grey) or 3 (RGB) can be audited; "
            "nothing was audited"
        )
    learned = getattr(settings, "variance_type", None) in ("learned", "learned_range")
    if config.out_channels != config.in_channels * (2 if learned else 1):
        raise InputError(
            f"{folder}: its network gives {config.out_channels} channels for {config.in_channels}, which "
            f"{type(model.scheduler).__name__} cannot use; nothing was audited"
        )
    if not config.sample_size:
        raise _incomplete(
            folder, "sample_size, the size of its images, is missing from its network's config.json"
        )
    kinds = ("epsilon", "v_prediction") if model.is_edm else ("epsilon", "sample", "v_prediction")
    if settings.prediction_type not in kinds:
        raise InputError(
            f"{folder}: prediction_type {settings.prediction_type} is none of {', '.join(kinds)}; nothing was "
            "audited"
        )
    if model.is_edm and config.time_embedding_type == "learned":
        raise InputError(
            f"{folder}: an EDM scheduler and a learned time embedding do not fit; nothing was audited"
        )
    try:
        low, high = model.sigma_range
        labels = None if model.label_names is None else torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            x = torch.zeros(1, model.channels, *model.size)
            out = model.denoise(x, torch.tensor([(low * high) ** 0.5]), labels)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: its network does not run ({_line(error)}); nothing was audited"
        ) from error
    if out.shape != x.shape or not bool(out.isfinite().all()):
        raise InputError(f"{folder}: its network gives no image; its weights are broken; nothing was audited")


def _part(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: its own folder, or the pipeline's (as older pipelines were saved)."""
    return folder / name if (folder / name).is_dir() else folder


def _kind(entry: Any) -> str | None:
    """The class of one entry of `model_index.json` if it is diffusers' own."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _incomplete(path.parent, f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _incomplete(path.parent, f"{path.name} is not JSON") from error
    if not isinstance(content, dict):
        raise _incomplete(path.parent, f"{path.name} holds no settings")
    return content


def _incomplete(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder} does not hold a complete diffusers pipeline: {what}; nothing was audited. Save it with "
        "save_pretrained, or give a folder of its images"
    )


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
