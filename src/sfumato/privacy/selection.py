"""Private model selection: which of several classifiers is right most often on private images held apart.

To choose a checkpoint or a setting by its accuracy on private images is itself a query and costs budget. Here
only the position of the chosen candidate leaves, by report-noisy-max, and neither its count nor the others'.

**Mechanism.** Candidate i is right on c_i units. Each count gets independent exponential noise of mean
1 / epsilon and the position of the largest sum is released. The noise is OpenDP's `make_noisy_max`, which
compares exactly sampled values, never floats. This is permute-and-flip in other words (McKenna and Sheldon,
arXiv 2010.12603; that the two are the same: Ding et al., arXiv 2105.07260), never worse than the exponential
mechanism.

**Guarantee.** One more unit raises each c_i by 0 or 1: sensitivity 1, and all in one direction (monotone).
Let d_i in {0, 1} be the rise. Whatever the other candidates' noise, candidate i wins exactly when its own
noise exceeds a threshold t = max_j (c_j + noise_j) - c_i; for the larger set t lies within [t - 1, t + 1].
With exponential noise P(noise > t) is min(1, exp(-epsilon t)), so moving t by at most 1 changes it by a factor
of at most exp(epsilon): (epsilon, 0)-DP by add-or-remove-one. Without monotonicity the thresholds would
move by up to 2, which is what replacing one unit does: 2 epsilon, as the accounting's group bound says.

**Event.** Every (epsilon, 0)-DP mechanism is a post-processing of randomised response (Kairouz, Oh and
Viswanath 2015), whose privacy loss distribution is that of discrete Laplace noise of scale 1 / epsilon and
sensitivity 1: losses +-epsilon with odds exp(epsilon). So `DiscreteLaplaceDpEvent(epsilon, 1)` is an exact
statement of "epsilon-DP and nothing more is claimed" that composes with all others (a test compares the two
distributions).

**Disjoint.** The images must not be those that the candidates were trained on. That is for usefulness: on
its own training images an overfitted candidate looks best. For the guarantee it does not matter, as training
and selection are charged to the same ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.mechanisms import _at_least, _one_row_per_unit, _padded_batches, _positive
from sfumato.privacy.randomness import SecureStream

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from sfumato.data.images import ProtectedImages
    from sfumato.privacy.ledger import Reservation

MODEL_SELECTION = "model_selection"

Candidate = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> labels, integers [B]: positions in the private images' `label_names`."""


def model_selection_event(epsilon: float) -> DpEvent:
    """The event of `best_candidate`."""
    from dp_accounting.dp_event import DiscreteLaplaceDpEvent

    return DiscreteLaplaceDpEvent(_positive(epsilon, "epsilon"), 1)


def best_candidate(
    private: ProtectedImages,
    candidates: Sequence[Candidate],
    epsilon: float,
    reservation: Reservation,
    batch_size: int = 256,
) -> tuple[int, DpEvent]:
    """The position of the candidate that is right on most units, by report-noisy-max, and the event.

    With m candidates the chosen one is right on fewer than ln(m / b) / epsilon units less than the best, but
    for chance b. Candidates that are equally often right are equally likely; with no units all are. A unit of
    several images is judged by one of them, drawn uniformly, the same for all candidates.

    Guarantee: (epsilon, 0)-DP by add-or-remove-one, see above. It requires that each candidate treats each
    image by itself: no batch normalisation in training mode, no randomness, nothing learnt from these images
    but what was charged. Candidates are tried on random images first, and batches are padded with zeros to
    `batch_size`, so that the other images never meet a batch of another shape.

    Args:
        candidates: At least two. A label outside of `label_names` is a wrong answer like any other.

    Raises:
        InputError: Unlabelled images, fewer than two candidates, answers that are not one whole number for
            each image, answers that depend on the rest of the batch; no budget was spent.
    """
    event = model_selection_event(epsilon)
    if len(candidates) < 2:
        raise InputError(
            f"there is nothing to choose between {len(candidates)} candidate(s); no budget was spent. Leave the "
            "selection out"
        )
    if not private.has_labels:
        raise InputError(
            "the images to choose by have no labels, so no answer is right; no budget was spent. Label them, or "
            "leave the selection out"
        )
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}; no budget was spent")
    for position, candidate in enumerate(candidates):
        _check_by_itself(candidate, position, private._images.shape[1:], batch_size)
    rows = _one_row_per_unit(private, SecureStream())
    exact = np.zeros(len(candidates), dtype=np.int64)
    for batch, images in _padded_batches(private, rows, batch_size):
        for position, candidate in enumerate(candidates):
            answers = _answers(candidate, position, images)[: len(batch)]
            exact[position] += np.count_nonzero(answers == private._labels[batch])
    scale = _at_least(1.0, 1 / epsilon, Fraction(epsilon))
    reservation.begin(MODEL_SELECTION, event)
    return _noisy_max(exact, scale), event


def _noisy_max(counts: np.ndarray, scale: float) -> int:
    """Position of the largest count plus exponential noise of mean `scale`, sampled exactly."""
    return int(_measurement(scale)([int(count) for count in counts]))


def _measurement(scale: float) -> Any:
    """OpenDP's noisy max for counts that one unit changes by at most 1, all in one direction."""
    from opendp import prelude

    dp: Any = prelude
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.linf_distance(T="i64", monotonic=True)
    return dp.m.make_noisy_max(*space, dp.max_divergence(), scale=float(scale))


def _check_by_itself(candidate: Candidate, position: int, shape: Any, batch_size: int) -> None:
    """Tries a candidate on random images: the answers for the first half must not change with the second."""
    source = np.random.default_rng(0)
    whole = source.integers(0, 256, (batch_size, *shape), dtype=np.uint8)
    half = (batch_size + 1) // 2
    first = _answers(candidate, position, whole.copy())[:half]
    for filling in (0, 255):
        whole[half:] = filling
        if not np.array_equal(_answers(candidate, position, whole.copy())[:half], first):
            raise InputError(
                f"candidate {position} does not judge each image by itself: on random images its answers change with "
                "the rest of the batch or by chance; no budget was spent. Put the network in eval mode"
            )


def _answers(candidate: Candidate, position: int, images: np.ndarray) -> np.ndarray:
    answers = np.asarray(candidate(images))
    if answers.shape != (len(images),) or not np.issubdtype(answers.dtype, np.integer):
        raise InputError(
            f"candidate {position} must give one whole number, a label, for each image; no budget was spent"
        )
    return answers
