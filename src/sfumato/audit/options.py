"""Options of `sfumato audit`: the fields are the command line, their docstrings its help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sfumato.errors import InputError

ATTACKS = ("random", "side", "carlini", "membership")
FEWEST_IMAGES, MOST_IMAGES = 50, 1_000_000


@dataclass(frozen=True)
class AuditOptions:
    """Find out what an image generator memorised of its training images, before anybody else does.

    Copies are looked for with several attacks, beside images that were held out; membership is inferred; with
    canaries ε is bounded from below. The result has no guarantee: it is for the owner, and stays in
    `internal/`. Exit status: 0 pass, 3 the policy is failed, 4 it cannot be decided. Running the same command
    again resumes.
    """

    target: Positional[str]
    """What is audited: a run, a release, a model's folder, a diffusers pipeline's folder (unconditional or
    class-conditional), or a set of generated images alone (then what needs the model is skipped)."""

    train: str
    """The images that it was trained on: a folder, .zip, .parquet, .npz, idx(.gz), demo:digits,
    fashion-mnist, or hf:NAME."""

    holdout: str | None = None
    """Images of the same kind that it was not trained on: what counts as a copy is calibrated on them. 1,000
    or more are best. Default: those of a built-in set, else none, and then nothing can be decided."""

    attacks: str = ",".join(ATTACKS)
    """What is tried, separated by commas: random (unguided images), side (SIDE with its controls and the
    classifier-conditioned baseline), carlini (its and Gu's ratios on unguided images), membership."""

    num_images: int = 1000
    """Images that each attack generates, N_G. Copies that are rarer than about three in this number are not
    found."""

    similarity: str = "pixels"
    """What decides which images are alike: pixels (tolerates flips and small shifts), tiles, phash, copy (a
    copy detector trained on these images), efficientnet-lite0, or PATH or NAME=PATH of a TorchScript file
    (SSCD, DINOv2), an .onnx file or a transformers folder."""

    guidance_features: str = "efficientnet-lite0"
    """The features that SIDE groups generated images by; has to differ from --similarity."""

    surrogate: Literal["classifier", "lora"] = "classifier"
    """How SIDE learns its groups: a small classifier of noisy images that guides the model, or low-rank adapters
    of the model itself, which suit large models (needs `pip install 'sfumato[lora]'`)."""

    policy: str | None = None
    """YAML file with what may pass; its keys are in docs/audit.md. Default: the defaults there."""

    canaries: str | None = None
    """The sealed.json that `sfumato canaries plant` wrote for this training set: adds the lower bound on ε."""

    out: str | None = None
    """Folder whose `internal/audit/` is written. Default: the run that is audited, else runs/NAME-audit."""

    size: int | None = None
    """Side of the square images that are compared, in pixels. Default: the target's own size."""

    seed: int = 0
    """Seed of what the audit draws: generated images, clusters, classifiers. An integer."""

    skip_unreadable: bool = False
    """Go on without real files that cannot be read. Default: stop at the first."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported (InputError names the option)."""
        for option, value, fits, range_ in (
            (
                "num-images",
                self.num_images,
                FEWEST_IMAGES <= self.num_images <= MOST_IMAGES,
                f"between {FEWEST_IMAGES} and {MOST_IMAGES:,}: with fewer nothing can be decided",
            ),
            ("size", self.size, self.size is None or 4 <= self.size <= 1024, "between 4 and 1024 pixels"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise InputError(
                    f"--{option} {value} cannot be used: it has to be {range_}; nothing was audited"
                )
        self.chosen  # noqa: B018  checked by reading it
        if self.similarity == self.guidance_features and "side" in self.chosen:
            raise InputError(
                f"--similarity and --guidance-features are both {self.similarity}: SIDE would look for copies with "
                "the eyes it was guided by; nothing was audited. Choose two different ones"
            )
        from sfumato.evaluation.options import refuse_inside_release

        refuse_inside_release(self.folder, "what an audit finds is", "nothing was audited")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The attacks, in their order of work.

        Raises:
            InputError: there is none, or one that does not exist.
        """
        named = [name.strip() for name in self.attacks.split(",") if name.strip()]
        unknown = [name for name in named if name not in ATTACKS]
        if unknown or not named:
            raise InputError(
                f"--attacks {self.attacks or '(nothing)'}: {unknown[0] if unknown else 'that'} is none of "
                f"{', '.join(ATTACKS)}; nothing was audited"
            )
        return tuple(name for name in ATTACKS if name in named)

    @property
    def folder(self) -> Path:
        """The folder with `internal/`: `out`, or the audited run, or runs/NAME-audit."""
        from sfumato.evaluation.options import find_target

        if self.out is not None:
            return Path(self.out).expanduser()
        found = find_target(self.target)
        if found.run is not None:
            return found.run
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.target).name.split(".")[0]).strip("-").lower()
        return Path("runs") / f"{name or 'target'}-audit"
