"""Options of `sfumato canaries plant`: the fields are the command line, their docstrings its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sfumato.errors import InputError

MOST_CANARIES = 1_000_000


@dataclass(frozen=True)
class PlantOptions:
    """Draw canaries, toss a coin for each, write the training folder that holds those that are in, seal the rest.

    A generator trained on DIR/train can then be audited: `sfumato audit TARGET --train DIR/train --canaries
    DIR/sealed.json` bounds its ε from below. Nobody who trains it may look into DIR/sealed.json or
    DIR/sealed.npz. DIR holds private images: it is for their owner, not for release.
    """

    private: Positional[str]
    """The sensitive images: a folder (class folders, or metadata.jsonl), a .zip of one, .parquet, .npz,
    idx(.gz), demo:digits, demo:glyphs, fashion-mnist, or hf:NAME."""

    count: int
    """Canaries, 1 or more. They put a cap on the bound: 1,000 can show ε 5.78 at most (δ 1e-5), and half of
    them are left out of training (own) or added to it (pattern)."""

    out: str
    """Folder to write, DIR: train/, sealed.json, sealed.npz. It may not exist yet, or has to be empty."""

    kind: Literal["own", "pattern"] = "own"
    """own: images of PRIVATE drawn at random; each stays with probability 1/2. pattern: crafted blots unlike any
    image, each added with probability 1/2 and a label drawn at random. Networks learn these by heart first,
    so they are the sharper test; but images of the model may look like them."""

    delta: float = 1e-5
    """δ of the claim that the bound is compared with; it enters the cap that is printed."""

    size: int | None = None
    """Side of the square images that are written, in pixels. Default: the images' own size."""

    channels: Literal[1, 3] | None = None
    """Colour channels: 1 (grey) or 3 (RGB). Default: the images' own."""

    skip_unreadable: bool = False
    """Go on without files that cannot be read. Default: stop at the first."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported (InputError names the option)."""
        for option, fits, range_ in (
            ("count", 1 <= self.count <= MOST_CANARIES, f"between 1 and {MOST_CANARIES:,}"),
            ("delta", 0 <= self.delta < 1, "0 or more and below 1"),
            ("size", self.size is None or 4 <= self.size <= 1024, "between 4 and 1024 pixels"),
        ):
            if not fits:
                raise InputError(
                    f"--{option} {getattr(self, option)} cannot be used: it has to be {range_}; nothing was planted"
                )
        from sfumato.evaluation.options import refuse_inside_release

        refuse_inside_release(Path(self.out).expanduser(), "canaries are", "nothing was planted")
