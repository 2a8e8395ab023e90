"""Options of `sfumato retrieve ACTION`: fields are the command line, docstrings its help."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from sfumato.errors import InputError

Mechanism = Literal["ball-filter", "ball", "topk"]
DEFAULT_DELTA = 1e-6


@dataclass(frozen=True)
class IndexOptions:
    """Make an index of private images that answers text prompts, on one budget for all of them.

    The index holds the images' vectors: it is as private as the images and never leaves. Running the same command again
    resumes.
    """

    private: Positional[str]
    """The private images: a folder (or metadata.jsonl with group_id), .zip, .parquet or .npz; or an .npz with `vectors`
    [N, D] of length 1 and `ids`."""

    epsilon: float
    """Privacy budget ε of all answers together, for adding or removing one unit."""

    out: str
    """Folder of the index."""

    queries: int = 10_000
    """How many different prompts may be asked, at most; the same prompt again is free."""

    delta: float | None = None
    """Probability δ with which the ε bound may fail. Default: 1/(n·ln n) for a declared --public-size n, at most
    1e-6."""

    ledger: str | None = None
    """The privacy account of these images: a file or an SQLAlchemy URL, made with `sfumato ledger create`. Default: one
    of this index's own."""

    mechanism: Mechanism = "ball-filter"
    """ball-filter: all images near a prompt, each with a budget of its own. ball: the same, every question charged in
    full. topk: DP-RDM as published."""

    encoder: str = "portraits"
    """Joint space of images and texts: a transformers CLIPModel or open_clip folder, or hf:OWNER/NAME. Default: the
    embedded small one, for drawn portraits."""

    public: str | None = None
    """Public images in the same domain, which thresholds, centres and directions come from. Default: the embedded
    ones."""

    planning_prompts: str | None = None
    """A text file of prompts like those that will be asked, one a line, to plan with. Default: the public images'
    captions."""

    unit: Literal["image", "group"] = "image"
    """What the guarantee protects: one image, or all images of one group_id."""

    public_size: int | None = None
    """Number of units, where you declare it to be public. Default: a noisy count. (The balls spend a fifth of ε
    on the collection's noisy mean and covariance, and have it from there; topk 2 %.)"""

    size: int | None = None
    """Side in pixels that images are kept at for the encoder. Default: what the encoder takes."""

    share: float | None = None
    """Ball: how much of the public images a neighbourhood holds, above 0 to 1. Default: planned."""

    neighbours: int | None = None
    """topk: k. Default: planned."""

    rate: float | None = None
    """topk: Poisson rate q of the sample that each question looks at. Default: 1, which costs least."""

    interpolation: float | None = None
    """topk: λ, the share of the private mean in what the generator is told. Default: planned."""

    skip_unreadable: bool = False
    """Leave out images that cannot be read."""

    dry_run: bool = False
    """Print the plan and stop: reads no private image, spends nothing."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        positive = (("epsilon", self.epsilon), ("queries", self.queries))
        for name, value in positive:
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name} must be above 0, not {value}; no budget was spent")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"--delta must lie between 0 and 1, not {self.delta}; no budget was spent")
        of_topk = {"neighbours": self.neighbours, "rate": self.rate, "interpolation": self.interpolation}
        for name, value in of_topk.items():
            if value is not None and self.mechanism != "topk":
                raise InputError(f"--{name} belongs to --mechanism topk; no budget was spent. Leave it out")
        if self.share is not None and self.mechanism == "topk":
            raise InputError("--share belongs to the ball mechanisms; no budget was spent. Give --neighbours")
        if self.neighbours is not None and self.neighbours < 1:
            raise InputError(f"--neighbours must be at least 1, not {self.neighbours}; no budget was spent")
        if self.interpolation is not None and not 0 <= self.interpolation <= 1:
            raise InputError(
                f"--interpolation must lie from 0 to 1, not {self.interpolation}; no budget was spent"
            )
        if self.dry_run and self.public_size is None:
            raise InputError(
                "--dry-run needs --public-size: the number of images is private; no budget was spent"
            )


@dataclass(frozen=True)
class AskOptions:
    """Ask a prompt: the first time is charged to the index, the same prompt again is free."""

    index: Positional[str]
    """An index, or a released codebook."""

    prompt: Positional[str]
    """What to draw, such as "a portrait with curly hair"."""

    out: str
    """New folder for the images and privacy.json."""

    num_images: int = 8
    """How many images (also -n)."""

    generator: str = "portraits"
    """What draws: a folder made by training/retrieval_generator.py, a Stable unCLIP pipeline, or PIPELINE+ADAPTER for
    IP-Adapter. Default: the embedded one."""

    fallback: bool = False
    """When the budget is spent, draw without asking instead of refusing."""

    seed: int = 0
    """Seed of the drawing (public randomness)."""

    steps: int = 25
    """Sampling steps."""

    guidance: float = 2.0
    """Guidance weight; 1 for none."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        _drawing(self.num_images, self.steps)


@dataclass(frozen=True)
class BatchOptions:
    """Ask every line of a file. Stops cleanly when the budget is spent; running the same command again goes on."""

    index: Positional[str]
    """An index, or a released codebook."""

    prompts: Positional[str]
    """A text file, one prompt a line."""

    out: str
    """Folder for the images; what is there already is not drawn again."""

    num_images: int = 8
    """How many images for each prompt (also -n)."""

    generator: str = "portraits"
    """What draws; see `sfumato retrieve ask --help`."""

    fallback: bool = False
    """When the budget is spent, go on without asking instead of stopping."""

    seed: int = 0
    """Seed of the drawing (public randomness)."""

    steps: int = 25
    """Sampling steps."""

    guidance: float = 2.0
    """Guidance weight; 1 for none."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        _drawing(self.num_images, self.steps)


@dataclass(frozen=True)
class CodebookOptions:
    """Release a codebook of the collection once: it answers any number of prompts afterwards, and may be handed out."""

    index: Positional[str]
    """The index."""

    epsilon: float
    """Privacy budget ε of the codebook, on top of what the index has reserved for questions."""

    out: str
    """Folder; the codebook is in OUT/release."""

    delta: float | None = None
    """Probability δ. Default: that of the index."""

    codes: int | None = None
    """Number of public centres. Default: planned from the public number of units."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(f"--epsilon must be above 0, not {self.epsilon}; no budget was spent")
        if self.codes is not None and self.codes < 1:
            raise InputError(f"--codes must be at least 1, not {self.codes}; no budget was spent")


@dataclass(frozen=True)
class AddOptions:
    """Add images to an index. Their ids must be new; a unit that was there before goes on with its budget."""

    index: Positional[str]
    """The index."""

    private: Positional[str]
    """The images to add, as for `sfumato retrieve index`."""

    skip_unreadable: bool = False
    """Leave out images that cannot be read."""


@dataclass(frozen=True)
class DeleteOptions:
    """Delete images from an index: their vectors are wiped, and answers kept so far are forgotten."""

    index: Positional[str]
    """The index."""

    ids: Positional[tuple[str, ...]]
    """Names of the images, as in their folder."""


@dataclass(frozen=True)
class StatusOptions:
    """Queries asked and budget left; public figures only."""

    index: Positional[str]
    """An index, or a released codebook."""


@dataclass(frozen=True)
class ServeOptions:
    """Answer prompts over HTTP, with a page to try it. Everybody it serves shares the index's one budget."""

    index: Positional[str]
    """An index, or a released codebook."""

    generator: str = "portraits"
    """What draws; see `sfumato retrieve ask --help`."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback need a token."""

    port: int = 8080
    """Port to listen on."""

    workers: int = 1
    """Processes; they share the ledger and never overspend together."""

    token_file: str | None = None
    """File with the bearer token that callers must send. Default: the environment variable SFUMATO_TOKEN, if set."""


def _drawing(images: int, steps: int) -> None:
    if not 1 <= images <= 10_000:
        raise InputError(f"--num-images must lie from 1 to 10000, not {images}; no budget was spent")
    if not 1 <= steps <= 1000:
        raise InputError(f"--steps must lie from 1 to 1000, not {steps}; no budget was spent")
