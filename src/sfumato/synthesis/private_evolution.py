"""Private Evolution (Lin et al., "Differentially Private Synthetic Data via Foundation Model APIs 1: Images",
arXiv 2305.15560): a public generator's images, chosen by noisy votes of the private ones and varied, in turns.

    Generator -> candidates -> [noisy votes -> resample -> vary] x T -> images

No training. The votes (`privacy.votes`) are the only thing that touches the private images; all else here is
post-processing of them and public randomness. Algorithm 1, run for each label (their appendix on conditional
generation), with VARIATION_API = partial noising (SDEdit, arXiv 2108.01073) of an EDM generator.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from sfumato.data.files import write_whole
from sfumato.data.images import ProtectedImages
from sfumato.diffusion.generator import BATCH, Generator, to_float, to_uint8
from sfumato.diffusion.sampling import Sampler, guided, noise_levels, sample
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.votes import MECHANISM, Embed, VoteCounter, nearest_neighbour_histogram_event
from sfumato.progress import Progress

STATE = "private_evolution.npz"
FEWEST_LEVELS = 3


@dataclass(frozen=True)
class EvolutionPlan:
    """Everything about a run of Private Evolution, fixed before the first vote. All of it is public.

    iterations: T, noisy votes in all. population: candidates voted on in each, spread evenly over the labels.
    noise_multiplier: sigma, standard deviation of the noise in a candidate's votes. threshold: H / sigma; H
    is subtracted from the noisy votes, and what is left below zero counts as none. lookahead: k, a candidate
    stands where the mean features of k variations of it are (0: where it is itself). sigma_first, sigma_last:
    noise levels of the first and the last variation, on the scale of pixels in [-1, 1]; geometric in between.
    """

    iterations: int
    population: int
    noise_multiplier: float
    threshold: float = 2.0
    lookahead: int = 0
    sigma_first: float = 2.0
    sigma_last: float = 0.3

    def __post_init__(self) -> None:
        limits = {
            "iterations": self.iterations >= 1,
            "population": self.population >= 1,
            "noise_multiplier": 0 < self.noise_multiplier < float("inf"),
            "threshold": 0 <= self.threshold < float("inf"),
            "lookahead": self.lookahead >= 0,
            "sigma_first": 0 < self.sigma_first < float("inf"),
            "sigma_last": 0 < self.sigma_last <= self.sigma_first,
        }
        for name, fine in limits.items():
            if not fine:
                raise InputError(
                    f"Private Evolution cannot run with {name}={getattr(self, name)}; no budget was spent"
                )

    def planned(self, label: str = "") -> PlannedEvent:
        """All votes, for `Ledger.reserve`; `label` opens the sentence shown in the certificate."""
        says = (
            f"{label + ': ' if label else ''}{self.iterations} votes of each unit for the nearest of "
            f"{self.population} generated candidates"
        )
        event = nearest_neighbour_histogram_event(self.noise_multiplier)
        return PlannedEvent(mechanism=MECHANISM, says=says, event=event, count=self.iterations)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each iteration's variation."""
        return tuple(float(s) for s in np.geomspace(self.sigma_first, self.sigma_last, self.iterations))

    def denoised_rows(self, sampler: Sampler, guidance: float, num_images: int | None = None) -> int:
        """Network rows that a whole run costs: for planners, and for comparing methods at equal compute."""
        rows = self.population * _calls(sampler)
        for turn, sigma in enumerate(self.sigmas, start=1):
            drawn = num_images or self.population if turn == self.iterations else self.population
            rows += (self.population * self.lookahead + drawn) * _calls(_partial(sampler, sigma))
        return rows * (1 if guidance == 1 else 2)


@dataclass(frozen=True)
class Evolved:
    """What `evolve` releases: differentially private by `EvolutionPlan.planned().total`.

    images: uint8 [N, H, W, C]. labels: int64 [N]. iterations_begun: charged in the ledger;
    iterations_applied: of use to the images (fewer after a crash between a vote and its answer).
    """

    images: np.ndarray
    labels: np.ndarray
    iterations_begun: int
    iterations_applied: int

    def take(self, num_images: int, labels: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The first `num_images` of them with their labels, each label equally often, or with these `labels`.

        Raises InputError when there are not as many; no more can be had without another vote.
        """
        if labels is None:
            labels = _evenly(num_images, int(self.labels.max()) + 1)
        wanted = np.asarray(labels, np.int64)
        rows = np.empty(num_images, np.int64)
        for label in np.unique(wanted):
            places, mine = np.flatnonzero(wanted == label), np.flatnonzero(self.labels == label)
            if len(mine) < len(places):
                raise InputError(
                    f"{len(places)} images of label {label} were asked for and {len(mine)} were voted for: Private "
                    "Evolution can hand on only those; ask for fewer (--num-images)"
                )
            rows[places] = mine[: len(places)]
        return self.images[rows], wanted


def evolve(
    generator: Generator,
    private: ProtectedImages,
    plan: EvolutionPlan,
    reservation: Any,
    encoder: Embed,
    *,
    work_dir: str | Path,
    seed: int = 0,
    num_images: int | None = None,
) -> Evolved:
    """Run Private Evolution until `plan.iterations` votes have begun in `reservation`.

    As in the paper, the images returned are the variations made after the last vote, not the candidates voted
    on; `num_images` of them (default: the population), each label equally often.

    Formal guarantee. All that is returned and all that is written to `work_dir` is post-processing of the
    votes, whose event is `plan.planned().total` for adding or removing one unit; `reservation` must hold it.

    generator: public, with the private label names; its conditioning may be meaningless. encoder: public;
    see `VoteCounter`. work_dir: where the population and the latest answer are kept, under `internal/`.
    Calling again after an interruption goes on from there. A vote that was charged but whose answer was lost
    stays spent and is never asked again: the run goes on with one vote fewer. seed: public randomness only.

    Raises InputError for unusable inputs, before anything is spent; LedgerError when the state and the ledger
    do not belong together; BudgetError when all votes are spent and every answer was lost.
    """
    _check(generator, private, plan, num_images)
    path, owner = Path(work_dir) / STATE, str(reservation.id)
    about = {"plan": dataclasses.asdict(plan), "seed": seed, "num_images": num_images, "owner": owner}
    state = _load(path, about, reservation)
    if state is None:
        labels = _evenly(plan.population, len(generator.label_names))
        images, _ = generator.generate(plan.population, labels=labels, seed=_seed(seed, 0, 0))
        state = _State(0, 0, images, labels, None)
        _save(path, state, about)
    counter = None
    for turn in range(state.turn + 1, plan.iterations + 1):
        if state.votes is None and reservation.begun(MECHANISM) < turn:
            features = _features(generator, state, plan, encoder, seed, turn)
            counter = counter or VoteCounter(private, encoder, plan.noise_multiplier)
            votes, _ = counter.votes(features, state.labels, reservation)
            state = replace(state, votes=votes)
            _save(path, state, about)  # the answer is durable before anything else is done with it
        last = turn == plan.iterations
        state = _next(generator, state, plan, seed, turn, num_images if last else None)
        _save(path, state, about)
    if state.applied == 0:
        raise BudgetError(
            "the run was stopped after its votes were charged and before any answer was saved: that cost is spent and "
            "the answers are lost. Start again with another --out, on a ledger with budget left"
        )
    return Evolved(state.images, state.labels, reservation.begun(MECHANISM), state.applied)


def vary(
    generator: Generator,
    images: np.ndarray,
    labels: np.ndarray,
    sigma: float,
    seed: int,
    *,
    description: str = "vary",
) -> np.ndarray:
    """Variations of images (uint8 [N, H, W, C]) by SDEdit: noise of level `sigma` is added and then removed.

    The sampler is the generator's own, started at `sigma` with as many steps as it has below that level. The
    same arguments give the same images on the same machine. Post-processing: free.
    """
    sampler = _partial(generator.sampler, sigma)
    device = next(generator.network.parameters()).device
    source = torch.Generator().manual_seed(seed)
    varied = np.empty_like(images)
    generator.network.eval()
    with Progress(description, len(images), "images") as progress:
        for start in range(0, len(images), BATCH):
            x = to_float(images[start : start + BATCH]).to(device)
            y = torch.from_numpy(np.asarray(labels[start : start + BATCH], np.int64)).to(device)
            varied[start : start + len(x)] = to_uint8(_renoised(generator, x, y, sampler, source))
            progress.advance(len(x))
    return varied


def survivors(
    noisy_votes: np.ndarray,
    labels: np.ndarray,
    wanted: np.ndarray,
    cut: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The candidate that each wanted image descends from: int64 [N], of the image's own label.

    Candidates of a label are drawn with replacement in proportion to max(votes - cut, 0) (algorithms 1 and
    2). A label left without any vote keeps all its candidates equally. Post-processing.

    noisy_votes, labels: [M]. wanted: label of each image to come [N]. cut: H, in votes.
    """
    weights = np.maximum(np.asarray(noisy_votes, dtype=np.float64) - cut, 0.0)
    chosen = np.empty(len(wanted), dtype=np.int64)
    for label in np.unique(wanted):
        mine, places = np.flatnonzero(labels == label), np.flatnonzero(wanted == label)
        share = weights[mine]
        if share.sum() > 0:
            chosen[places] = rng.choice(mine, len(places), p=share / share.sum())
        else:
            chosen[places] = np.resize(rng.permutation(mine), len(places))
    return chosen


@dataclass(frozen=True)
class _State:
    """`turn`: iterations behind us, `applied` of them with an answer. `votes`: answer of the next, when asked."""

    turn: int
    applied: int
    images: np.ndarray
    labels: np.ndarray
    votes: np.ndarray | None


def _next(
    generator: Generator, state: _State, plan: EvolutionPlan, seed: int, turn: int, num_images: int | None
) -> _State:
    """The next population from the votes; without an answer the population stays as it is."""
    labels = state.labels
    if num_images is not None:
        labels = _evenly(num_images, len(generator.label_names))
    if state.votes is None and len(labels) == len(state.labels):
        return replace(state, turn=turn)
    votes = np.zeros(len(state.labels)) if state.votes is None else state.votes
    rng = np.random.default_rng([seed, turn])
    parents = survivors(votes, state.labels, labels, plan.threshold * plan.noise_multiplier, rng)
    images = vary(
        generator, state.images[parents], labels, plan.sigmas[turn - 1], _seed(seed, turn, 0),
        description=f"evolution {turn}/{plan.iterations}: vary",
    )  # fmt: skip
    return _State(turn, state.applied + (state.votes is not None), images, labels, None)


def _features(
    generator: Generator, state: _State, plan: EvolutionPlan, encoder: Embed, seed: int, turn: int
) -> np.ndarray:
    """Where each candidate stands: float64 [M, D], the mean over `plan.lookahead` variations of it."""
    if plan.lookahead == 0:
        return _embedded(encoder, state.images)
    total = 0.0
    for copy in range(1, plan.lookahead + 1):
        varied = vary(
            generator, state.images, state.labels, plan.sigmas[turn - 1], _seed(seed, turn, copy),
            description=f"evolution {turn}/{plan.iterations}: look ahead {copy}/{plan.lookahead}",
        )  # fmt: skip
        total = total + _embedded(encoder, varied)
    return np.asarray(total) / plan.lookahead


def _embedded(encoder: Embed, images: np.ndarray) -> np.ndarray:
    batches = [encoder(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches])


@torch.no_grad()
def _renoised(
    generator: Generator, x: torch.Tensor, labels: torch.Tensor, sampler: Sampler, source: torch.Generator
) -> torch.Tensor:
    """`sample` in coordinates moved by x: what starts there as pure noise is x plus noise here."""
    none = torch.full_like(labels, generator.no_label)
    denoise = guided(
        lambda noisy, sigma: generator.edm.denoise(generator.network, noisy, sigma, labels),
        lambda noisy, sigma: generator.edm.denoise(generator.network, noisy, sigma, none),
        generator.guidance,
    )
    moved = sample(
        lambda offset, sigma: denoise(x + offset, sigma) - x, tuple(x.shape), sampler, source, device=x.device
    )
    return x + moved


def _partial(sampler: Sampler, sigma: float) -> Sampler:
    """The same sampler started at `sigma`, with the steps it has below."""
    below = int((noise_levels(sampler)[:-1] < sigma).sum())
    return replace(sampler, sigma_max=sigma, steps=max(FEWEST_LEVELS, below + 1))


def _calls(sampler: Sampler) -> int:
    """Network calls for one image."""
    return sampler.steps if sampler.kind == "ddim" else 2 * sampler.steps - 1


def _evenly(count: int, num_labels: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) * num_labels // count


def _seed(seed: int, turn: int, copy: int) -> int:
    """A seed of its own for each piece of public randomness, whether or not the run was interrupted."""
    return int(np.random.SeedSequence([seed, turn, copy]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check(
    generator: Generator, private: ProtectedImages, plan: EvolutionPlan, num_images: int | None
) -> None:
    labels = len(private.label_names)
    if tuple(generator.label_names) != tuple(private.label_names):
        raise InputError("the generator's labels are not those of the private images; no budget was spent")
    if (generator.size, generator.channels) != (tuple(private.size), private.channels):
        raise InputError(
            f"the generator makes images of {generator.size} and {generator.channels} channels, the private ones "
            f"are {tuple(private.size)} and {private.channels}; no budget was spent"
        )
    if min(plan.population, plan.population if num_images is None else num_images) < labels:
        raise InputError(
            f"Private Evolution needs at least one image for each of the {labels} labels, in the population and "
            "in the result (--num-images); no budget was spent"
        )
    if plan.sigma_last <= generator.sampler.sigma_min:
        raise InputError(
            f"sigma_last={plan.sigma_last:g} must be above the sampler's least noise level "
            f"{generator.sampler.sigma_min:g}; no budget was spent"
        )


def _save(path: Path, state: _State, about: dict[str, Any]) -> None:
    words = json.dumps({**about, "turn": state.turn, "applied": state.applied})
    votes: dict[str, Any] = {} if state.votes is None else {"votes": state.votes}
    content = io.BytesIO()
    np.savez(content, about=np.array(words), images=state.images, labels=state.labels, **votes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def _load(path: Path, about: dict[str, Any], reservation: Any) -> _State | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            words = json.loads(str(saved["about"]))
            turn, applied = words.pop("turn"), words.pop("applied")
            votes = saved["votes"] if "votes" in saved.files else None
            state = _State(turn, applied, saved["images"], saved["labels"], votes)
    except (OSError, KeyError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({error}); no budget was spent now. Use another --out"
        ) from error
    if words.pop("owner") != about["owner"] or turn + (votes is not None) > reservation.begun(MECHANISM):
        raise LedgerError(
            f"{path} was made under another reservation than the ledger has for this run: another ledger, or an older "
            "copy of it. Put back the ledger that the run was started with, or start again with another --out; no "
            "budget was spent"
        )
    if words != {key: value for key, value in about.items() if key != "owner"}:
        raise InputError(
            f"{path} was made with other settings; no budget was spent now. Repeat that run to resume it, or use "
            "another --out"
        )
    return state
