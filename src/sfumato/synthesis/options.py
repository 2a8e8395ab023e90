"""Options of `sfumato synthesize`: the fields are the command line, their docstrings its help."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tyro.conf import Positional

from sfumato.errors import InputError
from sfumato.synthesis.methods import METHODS

Method = Literal[
    "privimage", "privimage+feta", "dpdm", "feta", "pdp", "random-selection", "pe", "public-only"
]
Preset = Literal["demo", "fashion-mnist", "cifar10", "paper-fashion-mnist", "paper-cifar10"]
Unit = Literal["image", "group"]

# How many units these sets have is public knowledge.
KNOWN_SIZES = {"demo:digits": 4_000, "fashion-mnist": 60_000}
DELTA_WITHOUT_SIZE = 1e-6
DELTA_OF_DEMO = 1e-5


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make a differentially private image set, and its generator, from a set of sensitive images.

    Running the same command again resumes. Ctrl-C is safe at any moment.
    """

    private: Positional[str]
    """The sensitive images: a folder (class folders, or metadata.jsonl), a .zip of one, .parquet, .npz,
    idx(.gz), demo:digits, demo:glyphs, fashion-mnist, or hf:NAME."""

    epsilon: float
    """Privacy budget ε: how much the release may tell anybody about one unit (see --unit), for adding or
    removing it. A number above 0: below 1 is strong, 10 is weak. `public-only` spends none of it."""

    public: str | None = None
    """Images that harm nobody, with labels, in any form PRIVATE may have; the more they look like the
    sensitive ones, the better. Default: none (then only `--method dpdm` and `feta` can run)."""

    delta: float | None = None
    """Probability δ with which the ε bound may fail; has to be well below 1 / number of units. Default:
    1/(n·ln n) for a public size n, never above n^-1.1; without a public size 1e-6; for the demo 1e-5."""

    method: Method = "privimage"
    """privimage: ask privately which public classes are alike, train on them, then train on the sensitive
    images with noise (DP-SGD). dpdm: DP-SGD alone, without public images. feta: dpdm that starts from a noisy
    mean image of each label; privimage+feta: both. To compare with: pdp trains on all public images first,
    random-selection on classes drawn blindly; pe trains on public images alone and lets the sensitive ones
    vote for the best of what was generated (Private Evolution); public-only does not use the sensitive
    images and costs no budget."""

    preset: Preset | None = None
    """A named set of training settings, `paper-…` being the published ones (these want an accelerator).
    Options given beside it win. Default: that of the data where there is one, else the demo's."""

    size: int | None = None
    """Side of the square images that are trained and written, in pixels. Default: the preset's."""

    channels: Literal[1, 3] | None = None
    """Colour channels: 1 (grey) or 3 (RGB). Default: the preset's."""

    unit: Unit = "image"
    """What is protected as a whole: each image by itself, or all images of one `group_id` in metadata.jsonl
    together (a patient, an artist, a customer)."""

    public_size: int | None = None
    """Number of units, when it is no secret. Default: taken as secret, and a noisy count is bought with a
    fiftieth of ε."""

    num_images: int | None = None
    """How many synthetic images to write. Default: the preset's, else as many as the public size or noisy
    count."""

    time_budget: str = "10m"
    """Wall-clock time the run should take on this machine: 90s, 10m, 2h, 1h30m. Steps and batches are
    chosen to fit; more time makes better images, ε stays the same."""

    guidance: float | None = None
    """Classifier-free guidance weight when sampling, a factor; 1 is none, larger makes labels clearer and
    images more alike. Default: the preset's."""

    warm_up: int | None = None
    """Number of differentially private mean images for each label that training starts from (DP-FETA), paid
    for out of ε; 0 is none. Default: the preset's, 0; with `feta` 1."""

    robust: float | None = None
    """Make public training robust against the noise to come (RPGen): each step is taken at the worst weights
    within this distance (L2 norm over all weights), e.g. 0.2; 0 is off. A step then takes twice the time.
    Default: the preset's, 0."""

    ledger: str | None = None
    """The account that this run is charged to: a file, or an SQLAlchemy URL. Keep ONE ledger for one set
    of sensitive images, whatever is run on it. Default: OUT/internal/ledger.db, which knows of this run
    only."""

    out: str | None = None
    """Folder of the run; `release/` inside it may be handed on, `internal/` may not. Default:
    runs/NAME-epsE."""

    holdout: str | None = None
    """Real labelled images that PRIVATE does not contain, to measure the release with; the result stays
    in `internal/`. Default: the demo's own, else none."""

    audit: bool = False
    """Audit the images and the model before the release is written: it appears only if the audit passes (see
    `sfumato audit`). Needs --holdout. That a release appears at all then tells that it passed, and ε does
    not cover this one bit."""

    audit_policy: str | None = None
    """YAML file with what the audit lets pass; see docs/audit.md. Default: the defaults there."""

    seed: int = 0
    """Seed of public randomness: initial weights, public batches, sampling. An integer. DP noise and
    private sampling have no seed."""

    skip_unreadable: bool = False
    """Go on without private files that cannot be read. Default: stop before any budget is spent."""

    dry_run: bool = False
    """Print the plan (noise, steps, time) and stop. The sensitive images are not opened, nothing is
    spent."""

    config: str | None = None
    """YAML file with any of these options, e.g. the config.yaml of an earlier run. The command line wins
    over it. Default: none."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported.

        Raises:
            InputError: names the option; no budget was spent.
        """
        _must(self.epsilon > 0 and math.isfinite(self.epsilon), "--epsilon", self.epsilon, "a number above 0")
        _must(
            self.delta is None or 0 < self.delta < 1, "--delta", self.delta, "between 0 and 1, well below 1/n"
        )
        _must(self.size is None or 8 <= self.size <= 256, "--size", self.size, "between 8 and 256 pixels")
        _must(self.channels in (None, 1, 3), "--channels", self.channels, "1 or 3")
        for name in ("public_size", "num_images"):
            value = getattr(self, name)
            _must(value is None or value >= 1, "--" + name.replace("_", "-"), value, "1 or more")
        _must(self.guidance is None or self.guidance >= 0, "--guidance", self.guidance, "0 or more")
        _must(self.warm_up is None or 0 <= self.warm_up <= 50, "--warm-up", self.warm_up, "between 0 and 50")
        _must(self.robust is None or 0 <= self.robust <= 10, "--robust", self.robust, "between 0 and 10")
        seconds(self.time_budget)
        if self.delta is not None and self.units is not None and self.delta >= 1 / self.units:
            raise InputError(
                f"--delta {self.delta:g} is too large for {self.units} units: with a δ of 1/{self.units} a "
                "release could publish one of them outright; no budget was spent. Choose it below "
                f"{default_delta(self.units):.1g}, or leave it out."
            )
        if self.warm_up and METHODS[self.method].private != "dp-sgd":
            raise InputError(
                f"--warm-up starts DP-SGD, and --method {self.method} has none; no budget was spent. Leave one out."
            )
        if METHODS[self.method].public != "none" and self.public is None:
            raise InputError(
                f"--method {self.method} needs --public; no budget was spent. Give public images "
                "(--public demo:glyphs works everywhere), or choose --method dpdm."
            )

        if self.audit_policy is not None and not self.audit:
            raise InputError("--audit-policy is for --audit; no budget was spent. Give both or neither")

    @property
    def run_folder(self) -> Path:
        """The folder of this run: `out`, or runs/NAME-epsE made from the private images' name and ε."""
        if self.out is not None:
            return Path(self.out)
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.private).name.split(".")[0]).strip("-").lower()
        return Path("runs") / f"{name or 'images'}-eps{self.epsilon:g}"

    @property
    def ledger_url(self) -> str:
        """The ledger of this run: `ledger`, or internal/ledger.db inside the run's folder."""
        return self.ledger if self.ledger is not None else str(self.run_folder / "internal" / "ledger.db")

    @property
    def units(self) -> int | None:
        """The public number of units: declared, or common knowledge; None when it is private."""
        return self.public_size if self.public_size is not None else KNOWN_SIZES.get(self.private)

    @property
    def delta_used(self) -> float:
        """δ of this run: `delta`, or what its help says stands for it."""
        if self.delta is not None:
            return self.delta
        if self.private.startswith("demo:"):
            return DELTA_OF_DEMO
        return DELTA_WITHOUT_SIZE if self.units is None else default_delta(self.units)

    @property
    def seconds(self) -> float:
        """The time budget in seconds."""
        return seconds(self.time_budget)


def _must(holds: bool, option: str, value: object, range_: str) -> None:
    if not holds:
        raise InputError(f"{option} {value} cannot be used: it has to be {range_}; no budget was spent.")


def default_delta(units: int) -> float:
    """The δ of a run that names none: 1/(n·ln n) for n units, never above n^-1.1 or below 1e-10.

    Well below 1/n, as it must be; `units` is the declared or noisy number, never the true one.
    """
    n = max(3, units)
    return max(1e-10, min(1 / (n * math.log(n)), n**-1.1))


def seconds(text: str) -> float:
    """Seconds in a duration such as "90s", "10m", "2h" or "1h30m".

    Raises:
        InputError: not a duration above zero.
    """
    pieces = re.findall(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip().lower())
    rest = re.sub(r"\d+(?:\.\d+)?\s*[smh]", "", text.strip().lower()).strip()
    total = sum(float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in pieces)
    if rest or not pieces or total <= 0:
        raise InputError(
            f"--time-budget {text!r} is not a duration; no budget was spent. Write 90s, 10m, 2h or 1h30m."
        )
    return total


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, as keyword arguments for SynthesizeOptions.

    Keys are field names, with - or _; a value's type is checked by the command line or by `check`.

    Raises:
        InputError: the file is missing, is not YAML, is not a mapping, or has an unknown option.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; no budget was spent.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--config {path} is not YAML ({reason}); no budget was spent.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path} has to hold `option: value` lines; no budget was spent.")
    fields = {field.name: field for field in dataclasses.fields(SynthesizeOptions) if field.name != "config"}
    options = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name, value in options.items():
        if name not in fields:
            raise InputError(
                f"--config {path}: unknown option {name!r}; no budget was spent. "
                f"Known: {', '.join(sorted(fields))}."
            )
        options[name] = _converted(path, name, str(fields[name].type), value)
    return options


def _converted(path: str | Path, name: str, annotation: str, value: Any) -> Any:
    """`value` as the field's type; YAML reads 1e-5 as text and 8 as an integer, both are meant as numbers."""
    wrong = InputError(f"--config {path}: {name}: {value!r} cannot be used; no budget was spent. See --help.")
    if value is None:
        if "None" not in annotation:
            raise wrong
        return None
    if annotation.startswith("float"):
        try:
            return _if_right(not isinstance(value, bool), float(value), wrong)
        except (TypeError, ValueError):
            raise wrong from None
    if annotation.startswith("int") or name == "channels":
        return _if_right(isinstance(value, int) and not isinstance(value, bool), value, wrong)
    if annotation == "bool":
        return _if_right(isinstance(value, bool), value, wrong)
    choices = {"method": Method, "preset": Preset, "unit": Unit}.get(name)
    if choices is not None:
        return _if_right(value in get_args(choices), value, wrong)
    return str(value)


def _if_right(holds: bool, value: Any, wrong: InputError) -> Any:
    if not holds:
        raise wrong
    return value
