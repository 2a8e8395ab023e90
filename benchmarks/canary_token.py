"""Does one off-style image leave a trace in a released token? A membership game, at ε = 0.5 to infinity.

    python benchmarks/canary_token.py --out DIR     # DIR of benchmarks/personalize.py, whose tokens it uses

The canary is a portrait of another style among n - 1 of the private one. In each round a fair coin decides whether it
is in, the real mechanism releases a token, and two scores guess the coin: `direction`, which knows everything but the
coin (the other images, the canary's own token) and looks along the canary's residual; and `loss`, the audit's
membership score, the model's loss on the canary's pixels under the released token. From the right guesses follows
a lower
bound on ε (Clopper-Pearson, 95 %; privacy rule 17: a low bound is no evidence of privacy). The published method without
noise is shown beside ours.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from personalize import DELTA, FIRST_IMAGES, HELD_OUT, Known, vocabulary  # benchmarks/personalize.py

from sfumato.audit.epsilon_bound import epsilon_lower_bound
from sfumato.data.images import ProtectedImages
from sfumato.personalization.aggregation import geometry, make_plan, shrunk
from sfumato.personalization.inversion import InversionPlan, invert
from sfumato.personalization.style_bank import StyleBank, embedded_bank
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.vectors import vector_mean

EPSILONS = (0.5, 1.0, 2.0, 10.0, float("inf"))
SIZES = (47, 158)
DRAWS = 32  # noise levels of the loss score, the same for every token


def main() -> None:
    """Play, and write canary.json into --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="where portraits.py wrote its files")
    parser.add_argument("--out", type=Path, required=True, help="folder of benchmarks/personalize.py")
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--bank", type=Path, default=embedded_bank())
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument(
        "--loss-rounds", type=int, default=200, help="rounds that the slower loss score plays"
    )
    options = parser.parse_args()
    model, bank = TextToImage.open(options.model), StyleBank.load(options.bank)
    style, other = HELD_OUT[0], "big-smile"
    images = _images(options.data, style, model.size)
    canary = _images(options.data, other, model.size)[0]
    tokens = np.load(options.out / f"tokens-{style}-{FIRST_IMAGES}.npy", allow_pickle=False)
    latents = model.latents(canary[None])
    own = invert(model, latents, torch.from_numpy(bank.anchor), InversionPlan(seed=0))
    shape = geometry("dpagg-ti", bank.anchor, vocabulary(model), bank)
    direction = shape.basis @ (shape.basis.T @ (own[0] - bank.anchor))
    rng, rows = np.random.default_rng(0), []
    for n in SIZES:
        others = images[: n - 1]
        known = Known(np.concatenate([others, canary[None]]), np.concatenate([tokens[: n - 1], own]))
        worlds = []
        for here in (False, True):
            path = options.out / f"canary-{n}-{here}.npz"
            np.savez(path, images=np.concatenate([others, canary[None]]) if here else others)
            ledger = Ledger.open(options.out / f"canary-{n}-{here}.ledger.db", total=Budget(1e7, 0.9))
            worlds.append(
                ProtectedImages(
                    path,
                    ledger=ledger,
                    size=model.size,
                    channels=3,
                    public_size=n,
                    cache_dir=options.out / "cache",
                )
            )
        for epsilon in EPSILONS:
            rounds = options.rounds if epsilon < float("inf") else 200
            coins = rng.random(rounds) < 0.5
            held = [_reserved(world, shape, n, epsilon, rounds) for world in worlds]
            released = [
                _released(worlds[int(coin)], known, shape, n, epsilon, held[int(coin)]) for coin in coins
            ]
            along = np.array([(token - bank.anchor) @ direction for token in released])
            loss = -_losses(model, latents, np.stack(released[: options.loss_rounds]))
            for name, score in (("direction", along), ("loss", loss)):
                row = {"n": n, "epsilon": epsilon, "score": name, **_guessed(score, coins[: len(score)])}
                rows.append(row)
                print(json.dumps(row), flush=True)
    (options.out / "canary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _released(
    private: ProtectedImages, known: Known, shape: object, n: int, epsilon: float, reservation: object
) -> np.ndarray:
    """One token by the real mechanism; for ε = ∞ with noise that is nothing (multiplier 1e-6)."""
    plan = _plan(shape, n, epsilon)
    noisy, _ = vector_mean(private, known, plan.mean(), reservation)  # type: ignore[arg-type]
    return shrunk(noisy, plan.geometry.center, plan)


def _reserved(private: ProtectedImages, shape: object, n: int, epsilon: float, rounds: int) -> object:
    """One reservation for all rounds: the game is played many times, a user's release once."""
    if not np.isfinite(epsilon):
        return _Free()
    planned = [replace(each, count=rounds) for each in _plan(shape, n, epsilon).events]
    return private.ledger.reserve(f"canary {epsilon:g}", planned, delta=DELTA)


class _Free:
    """Stands in for a reservation where there is no guarantee to charge: ε = ∞ has no finite price."""

    def begin(self, mechanism: str, event: object) -> None:
        """Nothing is recorded."""


_PLANS: dict[tuple[int, float], object] = {}


def _plan(shape: object, n: int, epsilon: float):  # type: ignore[no-untyped-def]
    if (n, epsilon) not in _PLANS:
        made = make_plan("dpagg-ti", Budget(min(epsilon, 100.0), DELTA), n, shape)  # type: ignore[arg-type]
        if not np.isfinite(epsilon):
            made = replace(made, noise_multiplier=1e-6)
        _PLANS[n, epsilon] = made
    return _PLANS[n, epsilon]


@torch.no_grad()
def _losses(model: TextToImage, latents: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """The canary's loss under each token, float64 [T]; the same noise for all."""
    source = torch.Generator().manual_seed(1)
    noise = torch.randn((DRAWS, *latents.shape[1:]), generator=source)
    times = ((torch.arange(DRAWS) + 0.5) * len(model.alphas) / DRAWS).long()
    ids = [tower[:1].expand(DRAWS, -1) for tower in model.prompts(TEMPLATES[:1])]
    rows = torch.from_numpy(tokens).float()
    return np.array([
        model.losses(latents.expand(DRAWS, -1, -1, -1), noise, times, ids, token.expand(DRAWS, -1)).mean().item()
        for token in rows
    ])  # fmt: skip


def _guessed(score: np.ndarray, coins: np.ndarray) -> dict[str, float]:
    """A threshold from the first half of the rounds, guesses about the second; AUC over all, and the bound on ε."""
    half = len(score) // 2
    cuts = np.sort(score[:half])
    right = [((score[:half] > cut) == coins[:half]).mean() for cut in cuts]
    cut = cuts[int(np.argmax(right))]
    correct = int(((score[half:] > cut) == coins[half:]).sum())
    inside, outside = score[coins], score[~coins]
    auc = float((inside[:, None] > outside[None]).mean() + 0.5 * (inside[:, None] == outside[None]).mean())
    guesses = len(score) - half
    return {
        "auc": auc, "correct": correct, "guesses": guesses,
        "epsilon_at_least": epsilon_lower_bound(correct, guesses, guesses, delta=DELTA),
        "cap": epsilon_lower_bound(guesses, guesses, guesses, delta=DELTA),
    }  # fmt: skip


def _images(folder: Path, style: str, size: int) -> np.ndarray:
    with np.load(folder / f"portraits-{style}-{size}.npz", allow_pickle=False) as held:
        return held["images"]


if __name__ == "__main__":
    main()
