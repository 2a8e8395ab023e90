"""What is audited: one of our generators, a diffusers pipeline, or images that somebody made (a black box)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.audit.guidance import Gradient, guided_denoiser
from sfumato.audit.pipeline_folder import INDEX_FILE, open_pipeline
from sfumato.data.sources import open_source
from sfumato.diffusion.generator import SETTINGS_FILE, Generator
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import in_words
from sfumato.evaluation.options import find_target

__all__ = ["Claim", "GeneratorModel", "Gradient", "Model", "Target", "open_target"]

PICKLED = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
_OF_A_MODEL = (INDEX_FILE, "config.json", "scheduler_config.json")
_BLOCK = 1 << 20


class Model(Protocol):
    """A generator that an attack may look into. size: (H, W). sigma_range: the noise levels it was trained on."""

    @property
    def network(self) -> Any: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def channels(self) -> int: ...
    @property
    def num_labels(self) -> int | None: ...
    @property
    def label_names(self) -> tuple[str, ...] | None: ...
    @property
    def sigma_range(self) -> tuple[float, float]: ...
    @property
    def device(self) -> torch.device: ...

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """D(x; sigma) for x [R, C, H, W] = image + sigma * noise, sigma [R], labels int64 [R]; the image estimate."""
        ...

    def sample(
        self,
        num_images: int,
        *,
        labels: np.ndarray | None = None,
        seed: int = 0,
        gradient: Gradient | None = None,
        scale: float = 0.0,
        description: str = "generate",
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Images (uint8 [N, H, W, C]) and labels (int64 [N] or None), drawn in batches from the model's own sampler."""
        ...


@dataclass
class GeneratorModel:
    """One of our generators. `denoise` is its network without classifier-free guidance, `sample` is `generate`."""

    generator: Generator

    @property
    def network(self) -> Any:
        """The UNet2DModel."""
        return self.generator.network

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.generator.size

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.generator.channels

    @property
    def num_labels(self) -> int | None:
        """How many labels it knows."""
        return len(self.generator.label_names)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What they are called."""
        return self.generator.label_names

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Where its sampler ends and begins."""
        return self.generator.sampler.sigma_min, self.generator.sampler.sigma_max

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.generator.network.parameters()).device

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """`EDM.denoise`; labels None: the class "no label", or the only label there is."""
        if labels is None:
            only = 0 if self.num_labels == 1 else self.generator.no_label
            labels = torch.full((len(x),), only, dtype=torch.int64, device=x.device)
        return self.generator.edm.denoise(self.generator.network, x, sigma, labels)

    def sample(
        self,
        num_images: int,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        gradient: Gradient | None = None,
        scale: float = 0.0,
        description: str = "generate",
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """`Generator.generate` with the same seed and labels; a gradient is added to its denoiser (guidance.py)."""

        guide = None
        if gradient is not None and scale != 0:
            guide = partial(guided_denoiser, gradient=gradient, scale=scale)
        return self.generator.generate(
            num_images,
            labels=labels,
            seed=seed,
            guide=guide,
            description=description,
        )


@dataclass(frozen=True)
class Claim:
    """The guarantee that a release's privacy.json states: (epsilon, delta) for a unit under a relation."""

    epsilon: float
    delta: float
    unit: str
    relation: str


@dataclass(frozen=True)
class Target:
    """What is audited.

    description: one phrase. model: None for a black box. images: what `open_source` is given for the images
    that came with it, or None. claim: of its release, or None. identity: hexadecimal SHA-256 of the model's
    files, or for a black box of its images' fingerprint (names, sizes and times of files).
    """

    description: str
    kind: Literal["sfumato", "diffusers", "images"]
    model: Model | None
    images: str | None
    claim: Claim | None
    identity: str


def open_target(spec: str, *, steps: int | None = None) -> Target:
    """Open a run, a release, a model folder of ours, a diffusers pipeline folder, or any set of images.

    spec: a folder, a hub model as OWNER/NAME (its safetensors and JSON files are fetched), or images as
    `open_source` takes them. A release's own images/ folder is a black box with that release's claim.
    steps: sampling steps; by default the generator's own, 50 of a scheduler, at most 250 of DDPM.

    Raises:
        InputError: there is nothing of the kind, the model is incomplete or of another kind, or a file of
            its folder holds pickle.
    """
    text = str(spec)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix.lower() in (*PICKLED, ".safetensors"):
        if path.suffix.lower() in PICKLED:
            raise _pickled(path)
        raise InputError(
            f"{text} is one file of weights; nothing was audited. Give the folder of the whole model"
        )
    if _is_hub_model(text, path):
        path = _fetched(text)
    try:
        return _open_folder(text, path, steps) if path.is_dir() else _open_images(text, None)
    except OSError as error:
        raise InputError(f"{text} cannot be read ({error.strerror or error}); nothing was audited") from error


def _open_folder(text: str, path: Path, steps: int | None) -> Target:
    if (path / SETTINGS_FILE).is_file():
        return _open_generator(path, _release_of(path), steps)
    if (path / INDEX_FILE).is_file():
        _refuse_pickle(path)
        description, model = open_pipeline(path, steps=steps)
        return Target(description, "diffusers", model, None, None, _identity(path))
    release = find_target(text).release
    if release is not None:
        own_images = path.resolve() == (release / "images").resolve()
        if not own_images and (release / "model" / SETTINGS_FILE).is_file():
            return _open_generator(release / "model", release, steps)
        return _open_images(str(release / "images"), _claim(release))
    if (path / "model" / SETTINGS_FILE).is_file():
        return _open_generator(path / "model", None, steps)
    if any((path / name).is_file() for name in _OF_A_MODEL) or any(path.glob("*.safetensors")):
        _refuse_pickle(path)
        raise InputError(
            f"{text} holds a part of a model; nothing was audited. Give the folder with {INDEX_FILE} (diffusers) or "
            f"{SETTINGS_FILE} (ours), or a folder of its images"
        )
    if (path / "unet").is_dir() or (path / "scheduler").is_dir():
        _refuse_pickle(path)
        raise InputError(
            f"{text} does not hold a complete diffusers pipeline: {INDEX_FILE} is missing; nothing was audited. Save "
            "it with save_pretrained, or give a folder of its images"
        )
    try:
        return _open_images(text, None)
    except InputError:
        _refuse_pickle(path)  # no images, but weights: say what they are
        raise


def _open_generator(folder: Path, release: Path | None, steps: int | None) -> Target:
    from safetensors import SafetensorError

    _refuse_pickle(folder)
    try:
        generator = Generator.from_pretrained(folder)
    except (InputError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} does not hold a complete generator ({str(error).splitlines()[0][:300]}); nothing was audited"
        ) from error
    if steps is not None:
        generator = generator.with_sampling(sampler=replace(generator.sampler, steps=steps))
    generator.network.eval().requires_grad_(False)
    model, sampler = GeneratorModel(generator), generator.sampler
    if model.channels not in (1, 3):
        raise InputError(f"{folder}: images of {model.channels} channels cannot be audited, only 1 or 3")
    labels = "1 label" if model.num_labels == 1 else f"{model.num_labels} labels"
    description = (
        f"sfumato generator, {in_words((*model.size, model.channels))}, {labels}, "
        f"{sampler.kind} sampler of {sampler.steps} steps"
    )
    images = None if release is None else str(release / "images")
    claim = None if release is None else _claim(release)
    return Target(description, "sfumato", model, images, claim, _identity(folder))


def _open_images(spec: str, claim: Claim | None) -> Target:
    source = open_source(spec)
    return Target(f"images: {source.description}", "images", None, spec, claim, source.fingerprint)


def _release_of(model: Path) -> Path | None:
    """The release that a model folder of ours is part of."""
    around = model.resolve().parent
    complete = (around / "privacy.json").is_file() and (around / "images").is_dir()
    return around if complete and model.resolve().name == "model" else None


def _claim(release: Path) -> Claim:
    path = release / "privacy.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        epsilon, delta = (float(stated[name]) for name in ("epsilon", "delta"))
        claim = Claim(epsilon, delta, str(stated["unit"]), str(stated["relation"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} states no guarantee that can be read; nothing was audited") from error
    if not (math.isfinite(epsilon) and epsilon >= 0 and 0 <= delta < 1):
        raise InputError(
            f"{path} claims epsilon {epsilon:g}, delta {delta:g}, no guarantee; nothing was audited"
        )
    return claim


def _identity(folder: Path) -> str:
    """SHA-256 over names and content of the settings and weights of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            name = path.relative_to(folder).as_posix().encode()
            digest.update(len(name).to_bytes(8, "big") + name + path.stat().st_size.to_bytes(8, "big"))
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def _refuse_pickle(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLED and path.is_file():
            raise _pickled(path)


def _pickled(path: Path) -> InputError:
    return InputError(
        f"{path} may hold pickle, which can run any program when it is opened; nothing was audited. Save the model "
        "as safetensors (save_pretrained does) and remove this file, or give a folder of its images"
    )


def _is_hub_model(text: str, path: Path) -> bool:
    """OWNER/NAME, and no path: nothing is there, not even the folder it would lie in."""
    plain = (
        text.count("/") == 1
        and all(text.split("/"))
        and not text.startswith((".", "/", "~"))
        and ":" not in text
    )
    dotted = path.suffix != "" and not path.suffix[1:2].isdigit()  # a file's name; "v1.5" is none
    return plain and not dotted and not path.exists() and not path.parent.exists()


def _fetched(text: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(
            f"{text} is neither a folder nor a hub model that can be fetched; nothing was audited. Give the folder of "
            "a run, a release, a model or images"
        ) from error
