"""Options of `sfumato evaluate`: the fields are the command line, their docstrings its help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sfumato.errors import InputError

DEFAULT_FEATURES = "efficientnet-lite0,pixels"


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure synthetic images against the real ones: distances in feature spaces, accuracy of classifiers.

    The figures touch the real images without a guarantee: they are for the owner's eyes, not differentially
    private, and stay under `internal/`. Running the same command again resumes.
    """

    images: Positional[str]
    """The synthetic images: a run's folder, its release/, or any image set that `sfumato synthesize` takes."""

    against: str
    """The real images that were protected: a folder, .zip, .parquet, .npz, idx(.gz), demo:digits,
    fashion-mnist, or hf:NAME."""

    holdout: str | None = None
    """Real images that the release was not made from: classifiers are tested on them, and what real images
    themselves score is measured with them. Default: those of a built-in set, else none."""

    features: str = DEFAULT_FEATURES
    """Feature spaces, separated by commas: efficientnet-lite0, pixels, a TorchScript file or a transformers
    folder as PATH or NAME=PATH, or hf:OWNER/NAME."""

    out: str | None = None
    """Folder whose `internal/evaluation/` is written. Default: the run that the images are from, else
    runs/NAME-evaluation."""

    size: int | None = None
    """Side of the square images that are compared, in pixels. Default: the synthetic images' own size."""

    channels: Literal[1, 3] | None = None
    """Colour channels that are compared: 1 (grey) or 3 (RGB). Default: the synthetic images' own."""

    seeds: int = 1
    """How many times each classifier is trained, with seeds 0, 1, …; 3 or more show the spread."""

    reference_is_public: bool = False
    """You declare that --against and --holdout are public images, not the protected ones: the figures are
    then written into the release, as evaluation/."""

    skip_unreadable: bool = False
    """Go on without real files that cannot be read. Default: stop at the first."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported (InputError names the option)."""
        for option, fits, range_ in (
            ("size", self.size is None or 4 <= self.size <= 1024, "between 4 and 1024 pixels"),
            ("channels", self.channels in (None, 1, 3), "1 or 3"),
            ("seeds", 1 <= self.seeds <= 100, "between 1 and 100"),
        ):
            if not fits:
                raise InputError(
                    f"--{option} {getattr(self, option)} cannot be used: it has to be {range_}; nothing was done"
                )
        if self.reference_is_public and self.target.release is None:
            raise InputError(
                f"--reference-is-public puts figures into a release, and {self.images} is none (images/ beside "
                "privacy.json); nothing was done. Name a run or a release, or leave the option out"
            )
        if self.reference_is_public and self.out is not None:
            raise InputError(
                f"--reference-is-public writes into the release itself, so --out {self.out} cannot be used with it; "
                "nothing was done. Leave one of them out"
            )
        self.feature_specs  # noqa: B018  checked by reading it
        refuse_inside_release(self.folder, "these figures are", "nothing was done")

    @property
    def target(self) -> Target:
        """What `images` names: a run, a release, or a plain image set."""
        return find_target(self.images)

    @property
    def folder(self) -> Path:
        """The folder with `internal/`: `out`, or the run, or runs/NAME-evaluation."""
        if self.out is not None:
            return Path(self.out).expanduser()
        target = self.target
        if target.run is not None:
            return target.run
        named = Path(self.images)
        if target.release is not None:
            named = target.release.parent if target.release.name == "release" else target.release
        name = re.sub(r"[^A-Za-z0-9]+", "-", named.name.split(".")[0]).strip("-").lower()
        return Path("runs") / f"{name or 'images'}-evaluation"

    @property
    def feature_specs(self) -> tuple[str, ...]:
        """The feature spaces, each one specification for `open_encoder`.

        Raises:
            InputError: there is none, or one is named twice.
        """
        separator = "," if "," in self.features else None
        one = Path(self.features.partition("=")[2] or self.features).expanduser().exists()
        specs = [self.features] if one else self.features.split(separator)
        named = tuple(spec.strip() for spec in specs if spec.strip())
        if not named:
            raise InputError(f"--features names no feature space; nothing was done. Give {DEFAULT_FEATURES}")
        for spec in named:
            if named.count(spec) > 1:
                raise InputError(f"--features names {spec} twice; nothing was done. Name it once")
        return named


@dataclass(frozen=True)
class Target:
    """`images`: what `open_source` is given. `release`, `run`: the folders these are, if they are."""

    images: str
    release: Path | None = None
    run: Path | None = None


def find_target(spec: str) -> Target:
    """The images that `spec` names: those of a run (RUN/release/images) or of a release, or `spec` itself.

    Raises:
        InputError: a run without a finished release.
    """
    path = Path(spec).expanduser()
    if not path.is_dir():
        return Target(spec)
    if {path.name, path.parent.name} & {"", ".."}:
        path = path.resolve()
    for release in (path / "release", path, path.parent):
        if _is_release(release) and (release != path.parent or path.name == "images"):
            run = release.resolve().parent  # whatever the release is called, and through links
            of_a_run = (run / "internal").is_dir() or (run / "config.yaml").is_file()
            return Target(str(release / "images"), release, run if of_a_run else None)
    if (path / "config.yaml").is_file() and (path / "internal").is_dir():
        raise InputError(
            f"{spec} is a run without a finished release; nothing was done. Run its `sfumato synthesize` command "
            "again until it is complete"
        )
    return Target(spec)


def refuse_inside_release(folder: Path, what: str, ending: str) -> None:
    """Raise `InputError` when `folder`, for results that have no guarantee, lies in a release."""
    resolved = folder.resolve()
    inside = next((path for path in (resolved, *resolved.parents) if _is_release(path)), None)
    if inside is not None:
        raise InputError(
            f"'{folder}' lies inside the release '{inside}', and {what} not for release; {ending}. Give another --out"
        )


def _is_release(folder: Path) -> bool:
    return (folder / "privacy.json").is_file() and (folder / "images").is_dir()
