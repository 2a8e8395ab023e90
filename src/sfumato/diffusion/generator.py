"""A trained image generator: the network, what its labels are called, how to draw from it, save and load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.diffusion.edm import EDM
from sfumato.diffusion.sampling import Denoiser, Sampler, guided, sample
from sfumato.errors import InputError
from sfumato.progress import Progress

SETTINGS_FILE = "sfumato.json"
FORMAT = "sfumato-generator/1"
BATCH = 250

Guide = Callable[[Denoiser, np.ndarray], Denoiser]
"""From the denoiser of some rows (int64 positions in the whole call) to the one that they are drawn with."""


@dataclass
class Generator:
    """Images on demand from a label-conditional denoiser.

    Everything here is computed from released values and public randomness: generating any number of images
    with any seed is post-processing and costs no privacy budget.
    """

    network: Any
    label_names: tuple[str, ...]
    edm: EDM = field(default_factory=EDM)
    sampler: Sampler = field(default_factory=Sampler)
    guidance: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        side = self.network.config.sample_size
        return (side, side) if isinstance(side, int) else (side[0], side[1])

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.network.config.in_channels

    @property
    def no_label(self) -> int:
        """The class index that stands for "no label"."""
        return len(self.label_names)

    def with_sampling(self, *, sampler: Sampler | None = None, guidance: float | None = None) -> Generator:
        """The same network drawn from in another way."""
        return replace(
            self, sampler=sampler or self.sampler, guidance=self.guidance if guidance is None else guidance
        )

    def generate(
        self,
        num_images: int,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        guide: Guide | None = None,
        description: str = "generate",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw images (uint8 [num_images, H, W, C]) and return them with their labels (int64 [num_images]).

        `labels`: the wanted class of each image; by default every label equally often, in order. `guide`:
        changes the denoiser of each batch. The same arguments give the same images on the same machine.
        Post-processing: free, as long as the guide is.
        """
        if num_images < 1:
            raise InputError(f"cannot generate {num_images} images: ask for at least one (--num-images)")
        if labels is None:
            wanted = np.arange(num_images, dtype=np.int64) * len(self.label_names) // num_images
        else:
            wanted = np.asarray(labels, np.int64)
        if len(wanted) != num_images or wanted.min() < 0 or wanted.max() >= len(self.label_names):
            raise InputError(
                f"labels must be {num_images} class indices from 0 to {len(self.label_names) - 1} "
                f"({', '.join(self.label_names[:12])})"
            )
        device = next(self.network.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        images = np.empty((num_images, *self.size, self.channels), np.uint8)
        self.network.eval()
        with Progress(description, num_images, "images") as progress:
            for start in range(0, num_images, BATCH):
                batch = torch.from_numpy(wanted[start : start + BATCH]).to(device)
                rows = np.arange(start, start + len(batch))
                drawn = self._draw(batch, generator, device, guide, rows)
                images[start : start + len(batch)] = to_uint8(drawn)
                progress.advance(len(batch))
        return images, wanted

    def _draw(
        self,
        labels: Tensor,
        generator: torch.Generator,
        device: torch.device,
        guide: Guide | None,
        rows: np.ndarray,
    ) -> Tensor:
        none = torch.full_like(labels, self.no_label)
        denoise = guided(
            lambda x, sigma: self.edm.denoise(self.network, x, sigma, labels),
            lambda x, sigma: self.edm.denoise(self.network, x, sigma, none),
            self.guidance,
        )
        shape = (len(labels), self.channels, *self.size)
        denoise = denoise if guide is None else guide(denoise, rows)
        return sample(denoise, shape, self.sampler, generator, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `diffusion_pytorch_model.safetensors` (diffusers' files), `scheduler/` and
        ours.

        Stock `UNet2DModel.from_pretrained(folder)` loads the network, `EDMEulerScheduler.from_pretrained(
        folder, subfolder="scheduler")` a matching scheduler.
        """
        from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

        folder = Path(folder)
        self.network.save_pretrained(folder, safe_serialization=True)
        EDMEulerScheduler(
            sigma_min=self.sampler.sigma_min, sigma_max=self.sampler.sigma_max, sigma_data=self.edm.sigma_data
        ).save_pretrained(folder / "scheduler")
        settings = {
            "format": FORMAT,
            "label_names": list(self.label_names),
            "no_label": self.no_label,
            "pixel_range": [-1, 1],
            "edm": asdict(self.edm),
            "sampler": asdict(self.sampler),
            "guidance": self.guidance,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Generator:
        """Load what `save_pretrained` wrote, from a folder, a release or run folder around it, or a hub id."""
        from diffusers.models.unets.unet_2d import UNet2DModel

        folder = _model_folder(source)
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            network = UNet2DModel.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
            return cls(
                network,
                tuple(settings["label_names"]),
                EDM(**settings["edm"]),
                Sampler(**settings["sampler"]),
                float(settings["guidance"]),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} does not hold a complete sfumato generator: {error}") from error


def _model_folder(source: str | Path) -> Path:
    for folder in (Path(source), Path(source) / "model", Path(source) / "release" / "model"):
        if (folder / SETTINGS_FILE).is_file():
            return folder
    if Path(source).exists():
        raise InputError(
            f"{source} holds no generator: expected a folder with {SETTINGS_FILE}, such as RUN/release/model"
        )
    if str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(snapshot_download(str(source)))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{source} is neither a folder nor a hub model that can be fetched") from error
    raise InputError(f"{source} does not exist: give the folder of a model, such as RUN/release/model")


def to_uint8(images: Tensor) -> np.ndarray:
    """[R, C, H, W] floats in [-1, 1] (clipped) to uint8 [R, H, W, C]."""
    return images.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [R, H, W, C] to float32 [R, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
