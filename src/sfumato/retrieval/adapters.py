"""Stock pipelines that take image embeddings, told a noisy condition vector: Stable unCLIP, and base IP-Adapter.

Condition vectors are of length about 1 and these pipelines know the embeddings as the image tower gives them, so a
vector is brought to their typical length, which is public: it comes from the pipeline's own files. With c the vector,
σ its noise per coordinate and D its dimension, the share of its length that is signal is estimated as

    s = sqrt(max(|c|² - D σ², |c|² / 100)) / |c|

The prompt is left empty: what is drawn comes from the vector alone.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfumato.encoders.encoder import Preprocessing, device
from sfumato.encoders.quiet import quiet
from sfumato.errors import InputError
from sfumato.retrieval.generator import checked, in_batches, reason, unusable

if TYPE_CHECKING:
    from sfumato.encoders.text_image import TextImageEncoder

BATCH = 4
UNCLIP, STABLE_DIFFUSION = "StableUnCLIPImg2ImgPipeline", "StableDiffusionPipeline"
TOKENS = 4  # of a base IP-Adapter
_CLIP_MEAN, _CLIP_STD = (122.77, 116.75, 104.09), (68.50, 66.63, 70.32)
_SAME_SPACE = (
    0.5  # least mean cosine between two towers' vectors of one picture; of unrelated ones it is about 0
)


class UnclipGenerator:
    """A `StableUnCLIPImg2ImgPipeline`, which is told an embedding and how much noise it carries.

    The vector is brought to |c| = length / s, so that its signal has the typical length sqrt(|mean|² + |std|²) of the
    pipeline's image normaliser; see `noise_level` for what the pipeline is told. It would add noise of that level by
    itself; as the vector has it already, nothing is added.
    """

    def __init__(self, pipeline: Any, dimension: int) -> None:
        """InputError when the pipeline's embeddings are not of this dimension."""
        held = int(pipeline.image_normalizer.config.embedding_dim)
        if held != dimension or pipeline.unet.config.projection_class_embeddings_input_dim != 2 * held:
            raise _misfit(pipeline.name_or_path, held, dimension)
        self.pipeline, self.dimension = pipeline, dimension
        self.size = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
        mean, std = (getattr(pipeline.image_normalizer, name).detach() for name in ("mean", "std"))
        self.length = math.sqrt(float(mean.square().sum() + std.square().sum()))
        self.spread = float(std.square().reciprocal().mean().rsqrt())  # of a coordinate
        pipeline.noise_image_embeddings = functools.partial(_told_only, pipeline.noise_image_embeddings)

    @classmethod
    def open(cls, folder: Path, encoder: TextImageEncoder) -> UnclipGenerator:
        """InputError: no such pipeline, broken, or its image tower sees another space than `encoder`."""
        pipeline = _pipeline(folder, UNCLIP)
        made = cls(pipeline, encoder.dimension)
        _check_space(folder, pipeline.image_encoder, encoder)
        return made

    def generate(
        self,
        vector: np.ndarray,
        noise: float,
        n: int,
        *,
        seed: int,
        steps: int = 25,
        guidance: float = 2.0,
    ) -> np.ndarray:
        """See `generator.Generator`."""
        given = checked(vector, noise, self.dimension)
        size = self.length / max(_signal(given, noise), 1e-12)
        level = noise_level(self.pipeline.image_noising_scheduler, size * noise / self.spread)
        source = torch.Generator().manual_seed(seed)
        embedding = torch.from_numpy(size * given)[None].to(self.pipeline.device)

        def draw(rows: slice) -> np.ndarray:
            return _pixels(
                self.pipeline(
                    prompt="", image_embeds=embedding, noise_level=level, output_type="np", generator=source,
                    num_images_per_prompt=rows.stop - rows.start, num_inference_steps=steps,
                    guidance_scale=guidance,
                )
            )  # fmt: skip

        return in_batches(n, BATCH, draw)


class IpAdapterGenerator:
    """A `StableDiffusionPipeline` with a base IP-Adapter, which takes one pooled embedding and knows of no noise.

    The vector is brought to the typical length of embeddings, and the adapter's scale is s, the share that is signal: a
    vector that is mostly noise says little, instead of something wrong. Guidance is against the zero embedding.
    """

    def __init__(self, pipeline: Any, adapter: dict[str, Tensor], dimension: int, length: float) -> None:
        """adapter: tensors by their names in the adapter's file. length: typical, of an embedding.

        InputError when it is no base adapter, or its dimensions are not the pipeline's and the encoder's.
        """
        where = pipeline.name_or_path
        parts = {
            room: {
                name.removeprefix(f"{room}."): value
                for name, value in adapter.items()
                if name.startswith(room)
            }
            for room in ("image_proj", "ip_adapter")
        }
        if "proj.weight" not in parts["image_proj"] or not parts["ip_adapter"]:
            raise unusable(
                where, "was given an adapter that is no base IP-Adapter",
                "Give one that takes a single pooled embedding, such as ip-adapter_sd15.safetensors",
            )  # fmt: skip
        rows, held = parts["image_proj"]["proj.weight"].shape
        width = pipeline.unet.config.cross_attention_dim
        if rows != TOKENS * width:
            raise unusable(
                where, f"has cross-attention of width {width} and the adapter is for {rows // TOKENS}",
                "Give the adapter that was made for this pipeline",
            )  # fmt: skip
        if held != dimension:
            raise _misfit(where, held, dimension)
        try:
            with quiet():
                pipeline.load_ip_adapter(
                    parts,
                    subfolder=None,
                    weight_name=None,
                    image_encoder_folder=None,
                    low_cpu_mem_usage=False,
                )
        except (KeyError, ValueError, RuntimeError) as error:
            raise unusable(where, f"cannot take this adapter ({reason(error)})") from None
        pipeline.to(device())
        self.pipeline, self.dimension, self.length = pipeline, dimension, length
        self.size = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor

    @classmethod
    def open(cls, folder: Path, adapter: Path, encoder: TextImageEncoder) -> IpAdapterGenerator:
        """A pipeline's folder and an adapter's .safetensors.

        The image tower is image_encoder/ beside the adapter or in the pipeline: it tells the typical length and is
        compared with `encoder`. Without one the length is sqrt(D), a variance of 1 in each coordinate, and only
        dimensions are compared. InputError as for `UnclipGenerator.open`.
        """
        if adapter.suffix != ".safetensors" or not adapter.is_file():
            raise unusable(
                adapter, "is no .safetensors file of an adapter", "Give PIPELINE+ADAPTER.safetensors"
            )
        try:
            tensors = load_file(adapter)
        except (OSError, SafetensorError) as error:
            raise unusable(adapter, f"cannot be read ({reason(error)})") from None
        made = cls(
            _pipeline(folder, STABLE_DIFFUSION), tensors, encoder.dimension, math.sqrt(encoder.dimension)
        )
        for place in (adapter.parent / "image_encoder", folder / "image_encoder"):
            if (place / "config.json").is_file():
                made.length = _check_space(folder, _tower(place), encoder)
                break
        return made

    def generate(
        self,
        vector: np.ndarray,
        noise: float,
        n: int,
        *,
        seed: int,
        steps: int = 25,
        guidance: float = 2.0,
    ) -> np.ndarray:
        """See `generator.Generator`."""
        given = checked(vector, noise, self.dimension)
        whole = max(float(np.linalg.norm(given)), 1e-12)
        self.pipeline.set_ip_adapter_scale(_signal(given, noise) / whole)
        embedding = torch.from_numpy(self.length / whole * given).view(1, 1, -1).to(self.pipeline.device)
        if guidance > 1:
            embedding = torch.cat([torch.zeros_like(embedding), embedding])
        source = torch.Generator().manual_seed(seed)

        def draw(rows: slice) -> np.ndarray:
            return _pixels(
                self.pipeline(
                    prompt="", ip_adapter_image_embeds=[embedding], output_type="np", generator=source,
                    num_images_per_prompt=rows.stop - rows.start, num_inference_steps=steps,
                    guidance_scale=guidance,
                )
            )  # fmt: skip

        return in_batches(n, BATCH, draw)


def noise_level(schedule: Any, relative: float) -> int:
    """The level t a Stable unCLIP is told for noise that is `relative` times the spread of normalised embeddings.

    At t it expects sqrt(α_t) x + sqrt(1 - α_t) n, x and n of variance 1 in each coordinate, α the cumulative schedule:
    the first t with sqrt((1 - α_t) / α_t) >= relative, and the last one when there is none.
    """
    alphas = schedule.alphas_cumprod.double()
    ratios = ((1 - alphas) / alphas).sqrt()
    return min(int(torch.searchsorted(ratios, torch.tensor(relative, dtype=torch.float64))), len(ratios) - 1)


def _told_only(add: Any, image_embeds: Tensor, noise_level: Any, **_: Any) -> Tensor:
    """The pipeline's own step without its noise: scaled by sqrt(α_t), and the level appended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it makes a tensor of a tensor
        return add(image_embeds=image_embeds, noise_level=noise_level, noise=torch.zeros_like(image_embeds))


def _signal(vector: np.ndarray, noise: float) -> float:
    """Estimated length of what is not noise: s |c| of the module's formula."""
    square = float(vector.astype(np.float64) @ vector)
    return math.sqrt(max(square - len(vector) * noise**2, square / 100))


def _pixels(made: Any) -> np.ndarray:
    """Of a pipeline's answer, float [B, size, size, 3] in [0, 1]: uint8."""
    return (np.asarray(made.images) * 255).round().clip(0, 255).astype(np.uint8)


def _pipeline(folder: Path, kind: str) -> Any:
    """A stock pipeline of a folder, in single precision, on the device, without bars; InputError for another kind."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        held = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(folder, f"is no diffusers pipeline ({reason(error)})") from None
    if held != kind:
        raise unusable(
            folder, f"is a {held}, which takes no image embedding here",
            f"Give a {UNCLIP}, or {STABLE_DIFFUSION}+ADAPTER for IP-Adapter",
        )  # fmt: skip
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if kind == STABLE_DIFFUSION else {}
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True,
                low_cpu_mem_usage=False, **unchecked,
            )  # fmt: skip
            pipeline = pipeline.to(device())
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise unusable(folder, f"cannot be opened ({reason(error)})") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tower(folder: Path) -> Any:
    """The CLIP image tower of a folder."""
    from transformers import CLIPVisionModelWithProjection

    try:
        with quiet():
            return CLIPVisionModelWithProjection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unusable(folder, f"cannot be opened ({reason(error)})") from None


@torch.inference_mode()
def _check_space(where: Path, tower: Any, encoder: TextImageEncoder) -> float:
    """Typical length of the tower's embeddings, of pictures of coloured squares.

    InputError when it has another dimension than the encoder, or sees these pictures elsewhere.
    """
    if tower.config.projection_dim != encoder.dimension:
        raise _misfit(where, tower.config.projection_dim, encoder.dimension)
    squares = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    pictures = squares.repeat(16, 1).repeat(16, 2)
    side = tower.config.image_size
    prepare = Preprocessing((side, side), "bicubic", _CLIP_MEAN, _CLIP_STD)
    found = tower(prepare(torch.from_numpy(pictures).permute(0, 3, 1, 2)).to(tower.device)).image_embeds
    lengths = found.norm(dim=1)
    seen = (found / lengths[:, None]).cpu().numpy()
    if float((seen * np.asarray(encoder.images(pictures))).sum(1).mean()) < _SAME_SPACE:
        raise unusable(
            where, f"sees pictures in another space than encoder '{encoder.name}'",
            "Use the CLIP model that the pipeline's image_encoder comes from",
        )  # fmt: skip
    return float(lengths.mean())


def _misfit(where: str | Path, held: int, dimension: int) -> InputError:
    return unusable(
        where, f"takes vectors of {held} numbers and the encoder gives {dimension}",
        "Use the encoder that it was made for",
    )  # fmt: skip
