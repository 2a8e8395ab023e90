"""Options of `sfumato personalize`, `render` and `style-bank`: fields are the command line, docstrings its help."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from sfumato.errors import InputError

Method = Literal["dpagg-ti", "paper", "mean", "selection", "dp-sgd"]
DEFAULT_DELTA = 1e-5
SHEET_PROMPTS = (
    "a portrait with glasses in the style of {}",
    "a smiling portrait with long hair in the style of {}",
    "a portrait with a beard in the style of {}",
    "a portrait with short hair and a hat in the style of {}",
)
_TOKEN = re.compile(r"<[^<>\s]{1,60}>|[^\s<>]{2,60}")


@dataclass(frozen=True)
class PersonalizeOptions:
    """Learn one token for the style of some dozens of private images, and release it with a privacy guarantee.

    Running the same command again resumes. Ctrl-C never breaks the promise; what was charged stays charged.
    """

    images: Positional[str]
    """The private images, in one style: a folder (or metadata.jsonl with group_id), .zip, .parquet or .npz."""

    epsilon: float
    """Privacy budget ε: how much the token may tell anybody about one unit (see --unit), for adding or
    removing it. A number above 0: below 1 is strong, 10 is weak."""

    token: str
    """The new word, such as "<my-style>"; it must not be in the model's vocabulary."""

    model: str = "portraits"
    """The text-to-image model: a folder or hub id in StableDiffusionPipeline or StableDiffusionXLPipeline layout.
    Default: the embedded small model of drawn portraits."""

    delta: float = DEFAULT_DELTA
    """Probability δ with which the ε bound may fail; has to be well below 1 / number of units."""

    method: Method = "dpagg-ti"
    """dpagg-ti: one token per image, their noisy mean about a public anchor, along public directions of style,
    shrunk by the known noise. mean: in all directions, unshrunk. paper: DPAgg-TI as published. selection: the public
    style most images are nearest to; for very few images. dp-sgd: one token trained on all images with noise at every
    step."""

    anchor: str | None = None
    """What private tokens are measured from: a word of the model's vocabulary, such as art; `bank` for the mean of the
    public styles; `nearest` for the public style that most private images are nearest to, chosen with a part of ε.
    Default: bank where there is one, else art."""

    subspace: str | None = None
    """File of public styles for this model, made by `sfumato style-bank`. Default: the embedded model's own; none for
    another model."""

    directions: int | None = None
    """How many of the style bank's directions the token may move along. Default: all it holds."""

    unit: Literal["image", "group"] = "image"
    """What is protected as a whole: each image by itself, or all images of one `group_id` (an artist, a client)."""

    public_size: int | None = None
    """Number of units, when it is no secret. Default: taken as secret, and a noisy count is bought with a tenth of ε
    (not by selection, which needs none)."""

    vectors: int = 1
    """Rows of the token; more hold more of a style, and more noise. A style bank fixes it."""

    steps: int = 60
    """Training steps of each image's token."""

    learning_rate: float = 0.02
    """Learning rate of each image's token (Adam)."""

    batch_size: int = 32
    """Images that are inverted at once, for speed and memory."""

    ledger: str | None = None
    """The account that this run is charged to: a file, or an SQLAlchemy URL. Keep ONE ledger for one set of private
    images, whatever is run on it. Default: OUT/internal/ledger.db, which knows of this run only."""

    out: str | None = None
    """Folder of the run; `release/` inside it may be handed on, `internal/` may not. Default: runs/NAME-epsE."""

    seed: int = 0
    """Seed of public randomness: noise levels and prompts of the inversion, pictures of the report. DP noise has no
    seed."""

    skip_unreadable: bool = False
    """Go on without private files that cannot be read. Default: stop before any budget is spent."""

    dry_run: bool = False
    """Print the plan (noise, what would do) and stop. The private images are not opened, nothing is spent."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported (InputError)."""
        _must(self.epsilon > 0 and math.isfinite(self.epsilon), "--epsilon", self.epsilon, "a number above 0")
        _must(0 < self.delta < 1, "--delta", self.delta, "between 0 and 1, well below 1/n")
        _must(self.vectors >= 1, "--vectors", self.vectors, "1 or more")
        _must(self.steps >= 1, "--steps", self.steps, "1 or more")
        _must(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        _must(0 < self.learning_rate < 10, "--learning-rate", self.learning_rate, "above 0 and below 10")
        size = self.public_size
        _must(size is None or size >= 1, "--public-size", size, "1 or more")
        _must(self.directions is None or self.directions >= 1, "--directions", self.directions, "1 or more")
        check_token(self.token)
        if size is not None and self.delta >= 1 / size and self.method != "selection":
            raise InputError(
                f"--delta {self.delta:g} is too large for {size} units: with a δ of 1/{size} a release could "
                "publish one of them outright; no budget was spent. Choose it far below that"
            )
        if self.anchor == "nearest" and self.method in ("paper", "dp-sgd", "selection"):
            raise InputError(
                f"--anchor nearest does not go with --method {self.method}; no budget was spent. Leave one out"
            )

    @property
    def run_folder(self) -> str:
        """`out`, or runs/NAME-epsE made from the private images' name and ε."""
        if self.out is not None:
            return self.out
        last = self.images.rstrip("/").split("/")[-1].split(".")[0]
        name = re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-").lower()
        return f"runs/{name or 'images'}-eps{self.epsilon:g}"

    @property
    def ledger_url(self) -> str:
        """`ledger`, or internal/ledger.db inside the run's folder."""
        return self.ledger if self.ledger is not None else f"{self.run_folder}/internal/ledger.db"


@dataclass(frozen=True)
class RenderOptions:
    """Make pictures with a released style token. Post-processing: free, however many.

    The model is opened with stock diffusers, and so is the token.
    """

    model: Positional[str]
    """The text-to-image model the token was learnt for: a folder, a hub id, or `portraits`, the embedded one."""

    token_file: str
    """learned_embeds.safetensors of a release; for SDXL its learned_embeds_2.safetensors has to lie beside it."""

    prompt: str
    """What to draw, with the token in it: "a portrait with glasses in the style of <my-style>"."""

    num_images: int = 8
    """How many pictures, a number above 0. -n is the same."""

    out: str = "rendered"
    """Folder to write the pictures to. It must not hold anything yet."""

    steps: int = 30
    """Sampling steps."""

    guidance: float = 3.0
    """Classifier-free guidance weight; larger follows the prompt more closely and makes pictures more alike."""

    negative_prompt: str | None = None
    """What not to draw. Default: nothing."""

    seed: int = 0
    """Seed of sampling. The same seed makes the same pictures."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        for option, value, fits in (
            ("--num-images", self.num_images, 1 <= self.num_images <= 100_000),
            ("--steps", self.steps, 1 <= self.steps <= 1000),
            ("--guidance", self.guidance, 0 <= self.guidance < math.inf),
        ):
            if not fits:
                raise InputError(f"{option} {value} cannot be used; see `sfumato render --help`.")
        if not self.prompt.strip():
            raise InputError("--prompt is empty: say what to draw, with the token in it.")


@dataclass(frozen=True)
class StyleBankOptions:
    """Make a bank of public styles for a model: their tokens, and the directions in which styles differ.

    `sfumato personalize --subspace` uses it to add less noise. Nothing private may be in it.
    """

    styles: Positional[str]
    """Public images, one folder (label) for each style, in any form `sfumato synthesize` takes. Ten styles or more."""

    out: str
    """File to write, such as my-model.styles.safetensors."""

    model: str = "portraits"
    """The text-to-image model: a folder or hub id, as in `sfumato personalize`. Default: the embedded one."""

    anchor: str = "art"
    """Word of the vocabulary that learning starts from."""

    vectors: int = 1
    """Rows of a token."""

    directions: int = 16
    """Directions to keep, at most as many as there are styles."""

    images_per_style: int = 4
    """Single images of each style that get a token of their own: from these come the clip radius and the shrinkage."""

    steps: int = 60
    """Training steps of each token; `personalize` should use as many."""

    learning_rate: float = 0.02
    """Learning rate (Adam); `personalize` should use the same."""

    batch_size: int = 32
    """Images that are inverted at once."""

    seed: int = 0
    """Seed of everything random."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        for name in ("vectors", "directions", "images_per_style", "steps", "batch_size"):
            _must(getattr(self, name) >= 1, "--" + name.replace("_", "-"), getattr(self, name), "1 or more")
        _must(0 < self.learning_rate < 10, "--learning-rate", self.learning_rate, "above 0 and below 10")


def check_token(token: str) -> None:
    """Refuse what cannot be one word of a prompt (InputError)."""
    if token != token.lower():
        raise InputError(
            f"--token {token!r} has capital letters, which the models' tokenizers do not tell from small ones; no "
            "budget was "
            f"spent. Write it like {token.lower()!r}"
        )
    if not _TOKEN.fullmatch(token):
        raise InputError(
            f'--token {token!r} is not one word: no budget was spent. Write it like "<my-style>", without spaces'
        )


def _must(holds: bool, option: str, value: object, range_: str) -> None:
    if not holds:
        raise InputError(f"{option} {value} cannot be used: it has to be {range_}; no budget was spent.")
