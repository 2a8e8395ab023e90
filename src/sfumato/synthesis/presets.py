"""Named settings of a run. What enters the accounting is fixed here and by the planner, never by the data.

`demo` was tuned on the demonstration's own digits, which are public. The `paper-...` presets carry the
published settings of PrivImage (arXiv 2311.12850) and of its runs in DPImageBench (arXiv 2503.14681).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.diffusion.sampling import Sampler


@dataclass(frozen=True)
class Preset:
    """Settings of every stage; figures marked * are ceilings that the time budget may lower."""

    size: int = 28
    channels: int = 1
    network: str = "tiny"
    num_images: int | None = None
    guidance: float = 1.0
    sampler: str = "heun"
    sampler_steps: int = 10
    sigma_max: float = 80.0
    # semantic query and selection
    query_steps: int = 500
    top_k: int = 5
    classes_per_label: int = 5
    query_noise: float = 8.0
    # mean images (warm-up); none when 0
    means_per_label: int = 0
    means_noise: float = 2.5
    means_clip: float = 0.8  # root mean square of a pixel, in [0, 1]
    means_steps: int = 100
    # public training
    public_steps: int = 20_000  # *
    public_batch: int = 64
    public_lr: float = 4e-3
    public_ema: float = 0.999
    perturbation: float = 0.0  # radius of adversarial weight perturbation (RPGen); none when 0
    # DP-SGD
    sampling_probability: float = 0.25
    enough_steps: int = 64  # more when time is left, fewer when it is short
    noise_levels: int = 4  # *
    clip_norm: float = 1e-2
    private_lr: float = 2e-3
    private_ema: float = 0.95
    label_dropout: float = 0.1
    # votes (Private Evolution)
    votes: int = 6
    population: int = 2_000
    votes_encoder: str = "efficientnet-lite0"
    # share of the training time that goes to public training when there is a private stage
    public_share: float = 0.4
    time_bound: bool = True  # False: run the settings as they are, however long it takes

    @property
    def means_clip_norm(self) -> float:
        """The L2 norm that an image is clipped to before it is averaged."""
        return self.means_clip * (self.size**2 * self.channels) ** 0.5

    def sampling(self) -> Sampler:
        """How images are drawn."""
        from sfumato.diffusion.sampling import Sampler

        return Sampler(kind=self.sampler, steps=self.sampler_steps, sigma_max=self.sigma_max)  # type: ignore[arg-type]


PRESETS = {
    "demo": Preset(size=16, num_images=3000, guidance=1.2),
    "fashion-mnist": Preset(
        size=16, network="tiny-adaptive", num_images=4000, sampling_probability=0.005, enough_steps=400,
        guidance=1.2, public_lr=5e-3,
    ),
    "cifar10": Preset(
        size=32, channels=3, network="medium", num_images=5000, sampling_probability=0.1
    ),
    "paper-fashion-mnist": Preset(
        network="paper", query_noise=50.0, query_steps=20_000, public_steps=40_000, public_batch=1024,
        public_lr=3e-4, sampling_probability=4096 / 60_000, enough_steps=2100, noise_levels=32, clip_norm=1e-3,
        private_lr=3e-4, private_ema=0.999, sampler="churn", sampler_steps=50, num_images=60_000,
        time_bound=False,
    ),
    "paper-cifar10": Preset(
        size=32, channels=3, network="paper", query_noise=484.0, query_steps=40_000, public_steps=40_000,
        public_batch=512, public_lr=1e-4, sampling_probability=1 / 3, enough_steps=150, noise_levels=8,
        clip_norm=1e-3, private_lr=3e-4, private_ema=0.999, sampler="ddim", sampler_steps=50,
        num_images=50_000, time_bound=False,
    ),
}  # fmt: skip


def preset_for(name: str | None, private: str) -> Preset:
    """The preset of that name; without one, the one named after the data, else the demo's."""
    if name is None:
        kind = private.split(":")[0]
        name = kind if kind in PRESETS else "demo"
        if name == "demo" and not private.startswith("demo:"):
            return replace(PRESETS["demo"], num_images=None)
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)} (--preset)")
    return PRESETS[name]
