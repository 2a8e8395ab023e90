"""The methods of `sfumato synthesize`: which public images they train on, and what they ask of the private ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """public: the public images that training starts from: none; "queried" (the classes that a private query
    chose); "random" (as many classes, drawn blindly); "all" (each class under a label drawn blindly); "named" (the
    classes that bear a label's name; where a label has none, all images, each under a random label).
    means: first train on noisy mean images of each label (DP-FETA). private: what is then learnt from the
    private images, by DP-SGD or by votes among generated images.
    """

    public: Literal["none", "queried", "random", "all", "named"]
    means: bool = False
    private: Literal["none", "dp-sgd", "votes"] = "dp-sgd"


METHODS = {
    "privimage": Method("queried"),  # arXiv 2311.12850
    "privimage+feta": Method("queried", means=True),
    "dpdm": Method("none"),  # arXiv 2210.09929
    "feta": Method("none", means=True),  # arXiv 2504.01395
    "pdp": Method("all"),  # PDP-Diffusion, arXiv 2302.13861
    "random-selection": Method("random"),
    "pe": Method("named", private="votes"),  # Private Evolution, arXiv 2305.15560
    "public-only": Method("named", private="none"),
}
