"""Pictures from a noisy condition vector: a small latent diffusion that is told how much noise the vector carries.

Stock diffusers networks (U-Net with cross-attention, tiny autoencoder, DDIM) and a condition network of our own: vector
and noise level become a few cross-attention tokens. After RDM-adapt (arXiv 2403.14421), which trains under noise but
is not told of it and knows no empty condition. All of it is post-processing of what it is given: free, however often.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.data.images import OwnerArray
from sfumato.encoders.encoder import device
from sfumato.encoders.quiet import quiet
from sfumato.errors import InputError
from sfumato.progress import Progress

if TYPE_CHECKING:
    from sfumato.encoders.text_image import TextImageEncoder

EMBEDDED = "portraits"
FORMAT = "sfumato-retrieval-generator/1"
BATCH = 64
ACCEPTED = (
    "Give portraits, a folder made by training/retrieval_generator.py, a Stable unCLIP pipeline, or PIPELINE+ADAPTER "
    "for IP-Adapter"
)
_LEAST = 0.01  # noise below this, as a share of a unit vector's length, counts as none
_RATES = (0.5, 1.0, 2.0, 4.0)


class Generator(Protocol):
    """What draws. dimension: D of its condition vectors. size: pixels of a side.

    generate: vector float [D]; noise: standard deviation, per coordinate, of what the vector still carries, 0 for none
    -> uint8 [n, size, size, 3], the same for the same arguments.
    """

    @property
    def dimension(self) -> int: ...
    @property
    def size(self) -> int: ...
    def generate(
        self,
        vector: np.ndarray,
        noise: float,
        n: int,
        *,
        seed: int,
        steps: int = 25,
        guidance: float = 2.0,
    ) -> np.ndarray: ...


class ConditionNetwork(nn.Module):
    """(vector, noise level) -> cross-attention tokens; `nothing` [tokens, width] stands for no condition at all."""

    def __init__(self, dimension: int, *, hidden: int = 192, tokens: int = 4, width: int = 160) -> None:
        super().__init__()
        self.settings = {"dimension": dimension, "hidden": hidden, "tokens": tokens, "width": width}
        self.layers = nn.Sequential(
            nn.Linear(dimension + 1 + 2 * len(_RATES), hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, tokens * width),
        )  # fmt: skip
        self.nothing = nn.Parameter(0.5 * torch.randn(tokens, width))

    def forward(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """vectors [B, D] with noise of deviation [B] per coordinate -> [B, tokens, width].

        A unit vector and its noise are scaled to variance 1 together (c_in of arXiv 2206.00364); the level is told by
        its logarithm, relative to a unit vector's length.
        """
        dimension = self.settings["dimension"]
        scaled = vectors * (1 / dimension + noise.square()).rsqrt().unsqueeze(1)
        level = (noise * math.sqrt(dimension)).clamp_min(_LEAST).log().unsqueeze(1)
        angles = level * level.new_tensor(_RATES)
        told = self.layers(torch.cat([scaled, level / 3, angles.sin(), angles.cos()], 1))
        return told.unflatten(1, self.nothing.shape)


class RetrievalGenerator:
    """See above. Everything is frozen, in eval mode and in single precision; folders hold half precision.

    encoder: identity of the encoder it was trained for. dimension: D. size: pixels of a side.
    """

    def __init__(
        self, unet: Any, vae: Any, scheduler: Any, condition: ConditionNetwork, encoder: str
    ) -> None:
        place = device()
        self.unet, self.vae = (part.to(place).float().eval().requires_grad_(False) for part in (unet, vae))
        self.told = condition.to(place).float().eval().requires_grad_(False)
        self.scheduler, self.encoder = scheduler, encoder
        self.dimension = condition.settings["dimension"]
        self.size = int(unet.config.sample_size) * 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RetrievalGenerator:
        """What `save_pretrained` wrote. InputError: something is missing, broken, or of another format."""
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        folder = Path(folder)
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if settings["format"] != FORMAT:
                raise ValueError(f"format {settings['format']!r} is not {FORMAT}")
            condition = ConditionNetwork(
                settings["dimension"], hidden=settings["hidden"], tokens=settings["tokens"],
                width=settings["width"],
            )  # fmt: skip
            condition.load_state_dict(load_file(folder / "condition.safetensors"))
            with quiet():
                unet = _network(UNet2DConditionModel, folder / "unet")
                vae = _network(AutoencoderTiny, folder / "vae")
                scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
            made = cls(unet, vae, scheduler, condition, str(settings["encoder"]))
            if made.size != settings["size"] or unet.config["cross_attention_dim"] != settings["width"]:
                raise ValueError("config.json and the networks disagree")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise unusable(folder, f"cannot be opened ({reason(error)})") from None
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """unet/, vae/ and scheduler/ as stock diffusers has them, condition.safetensors, and config.json last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, network in (("unet", self.unet), ("vae", self.vae)):
            half = copy.deepcopy(network).half()
            half.register_to_config(_name_or_path="")  # where it was once loaded from is nobody's business
            half.save_pretrained(folder / name)
        self.scheduler.save_pretrained(folder / "scheduler")
        weights = {name: value.half().cpu() for name, value in self.told.state_dict().items()}
        save_file(weights, folder / "condition.safetensors", metadata={"format": "pt"})
        about = {"format": FORMAT, "encoder": self.encoder, "size": self.size, **self.told.settings}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @torch.inference_mode()
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
        """uint8 [n, size, size, 3] from float [D] and its noise per coordinate; see `Generator`.

        steps: of DDIM. guidance: 1 takes the condition as it is, more moves away from what none would give.
        """
        place = self.unet.device
        given = torch.from_numpy(checked(vector, noise, self.dimension)).to(place)
        tokens = self.told(given[None], torch.tensor([noise], dtype=torch.float32, device=place))
        shape = (n, self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        starts = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        def draw(rows: slice) -> np.ndarray:
            latents = starts[rows].to(place)
            told = tokens.expand(len(latents), -1, -1)
            if guidance != 1:
                told = torch.cat([self.told.nothing.expand(len(latents), -1, -1), told])
            self.scheduler.set_timesteps(steps, device=place)
            for moment in self.scheduler.timesteps:
                twice = latents if guidance == 1 else torch.cat([latents, latents])
                made = self.unet(twice, moment, told).sample
                if guidance != 1:
                    without, under = made.chunk(2)
                    made = without + guidance * (under - without)
                latents = self.scheduler.step(made, moment, latents).prev_sample
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            pixels = ((pixels + 1) * 127.5).clamp(0, 255).round().byte()
            return pixels.permute(0, 2, 3, 1).cpu().numpy()

        return in_batches(n, BATCH, draw)


def open_generator(spec: str, encoder: TextImageEncoder) -> Generator:
    """What draws for vectors of this encoder; what it is shows from the folder's files.

    spec: "portraits", the embedded one; a folder `RetrievalGenerator.save_pretrained` wrote; a folder in
    `StableUnCLIPImg2ImgPipeline` layout; or "PIPELINE+ADAPTER", a `StableDiffusionPipeline` folder and the .safetensors
    file of a base IP-Adapter. Raises InputError: no such thing, broken, or of another encoder.
    """
    path = Path(spec).expanduser()
    if spec == EMBEDDED and not path.exists():
        path = Path(__file__).parent / EMBEDDED
    if not path.exists() and "+" in spec:
        from sfumato.retrieval.adapters import IpAdapterGenerator

        pipeline, _, adapter = spec.rpartition("+")
        return IpAdapterGenerator.open(Path(pipeline).expanduser(), Path(adapter).expanduser(), encoder)
    if (path / "model_index.json").is_file():
        from sfumato.retrieval.adapters import UnclipGenerator

        return UnclipGenerator.open(path, encoder)
    if not (path / "config.json").is_file():
        raise unusable(spec, "is no generator: it has neither model_index.json nor config.json", ACCEPTED)
    generator = RetrievalGenerator.from_pretrained(path)
    if generator.encoder != encoder.identity:
        raise unusable(
            spec, f"was made for another encoder than '{encoder.name}'",
            "Use the encoder it was made for, or train one for yours with training/retrieval_generator.py",
        )  # fmt: skip
    return generator


def checked(vector: np.ndarray, noise: float, dimension: int) -> np.ndarray:
    """A condition as float32 [D]. ValueError for another shape or what is not finite; TypeError for private features,
    which no picture may be drawn from."""
    if isinstance(vector, OwnerArray):
        raise TypeError(
            "the condition is an owner's own feature, without any guarantee: nothing is drawn from it"
        )
    given = np.array(vector, np.float32)
    if given.shape != (dimension,) or not np.isfinite(given).all():
        raise ValueError(f"the condition must be {dimension} finite numbers, not {given.shape}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"the condition's noise must be 0 or more, not {noise}")
    return given


def in_batches(n: int, batch: int, draw: Callable[[slice], np.ndarray]) -> np.ndarray:
    """n pictures from `draw`, which is given the rows of each batch. ValueError unless n >= 1."""
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    if n <= batch:
        return draw(slice(0, n))
    drawn = []
    with Progress("draw", n, "pictures") as progress:
        for start in range(0, n, batch):
            drawn.append(draw(slice(start, min(n, start + batch))))
            progress.advance(len(drawn[-1]))
    return np.concatenate(drawn)


def unusable(where: str | Path, problem: str, remedy: str = "Give a complete one") -> InputError:
    """The one-line error for a generator that cannot be used."""
    return InputError(f"--generator {where} {problem}; no budget was spent. {remedy}")


def reason(error: Exception) -> str:
    """The start of an error of other libraries, in one line."""
    named = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return " ".join(named.split())[:200]


def _network(kind: Any, folder: Path) -> Any:
    """A stock network from its folder; ValueError when weights are missing in it."""
    network, found = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    if found["missing_keys"] or found.get("mismatched_keys"):
        raise ValueError(f"{folder.name} lacks weights")
    return network
