"""Private styles as tokens: every method and baseline at every budget, against no token and the non-private mean.

    python benchmarks/data/portraits.py public held-out
    python benchmarks/personalize.py --tier cpu --out DIR      # resumable; two to three hours on two cores
    python benchmarks/personalize.py --tier full --out DIR     # more pictures and draws; for an accelerator

Private: portraits in styles that the embedded model, its bank and every setting never saw. For each style and n, one
token per image is learnt once; every release then goes through the real mechanism on a real ledger. Pictures are drawn
for held-out content prompts and compared with 1,000 other images of the style: kernel distance (KID) of
EfficientNet-Lite0 features, and the style score among 17 public styles and the other private ones. Position: 0 % is the
non-private mean of tokens, 100 % is no token. Writes cells.jsonl, table.md and contact-STYLE.png into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
from fetch import CACHE
from portraits import HELD_OUT, PUBLIC

from sfumato.data.images import ProtectedImages
from sfumato.encoders.encoder import open_encoder
from sfumato.evaluation.kernel_distance import squared_mmd
from sfumato.evaluation.style import style_score
from sfumato.personalization.aggregation import cosine, geometry, make_plan, shrunk
from sfumato.personalization.dp_sgd_inversion import DPSGDSettings, dp_sgd_inversion, dp_sgd_plan
from sfumato.personalization.inversion import InversionPlan, invert, invert_style
from sfumato.personalization.run import vocabulary
from sfumato.personalization.style_bank import StyleBank, embedded_bank
from sfumato.personalization.style_votes import style_votes
from sfumato.personalization.text_to_image import TextToImage, open_pipeline
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.vectors import nearest_candidate, vector_mean

SIZES = (158, 47, 500)
EPSILONS = (0.5, 1.0, 2.0, 5.0, 10.0)
DELTA = 1e-5
CONTENT = (
    "a portrait with glasses", "a smiling portrait with long hair", "a portrait with a beard", "a portrait with "
    "short hair",
    "a sad portrait with curly hair", "a drawing with sunglasses and a moustache", "a portrait with a hat",
    "a picture with black hair and earrings",
)  # fmt: skip
FIRST_IMAGES, PRIVATE_IMAGES, REFERENCE_IMAGES, PUBLIC_EACH = 160, 500, 1000, 150


@dataclass(frozen=True)
class Tier:
    """pictures: drawn for each released token. steps: of sampling. draws: noise draws of each cell."""

    pictures: int
    steps: int
    draws: int
    dp_sgd_draws: int


TIERS = {"cpu": Tier(32, 12, 5, 2), "full": Tier(504, 50, 5, 5)}


@dataclass(frozen=True)
class Cell:
    """One released token: which method, on how many images, at which ε (inf for none), which draw of the noise."""

    style: str
    n: int
    method: str
    epsilon: float
    draw: int

    @property
    def key(self) -> str:
        return f"{self.style}/{self.n}/{self.method}/{self.epsilon:g}/{self.draw}"


def cells(tier: Tier, styles: tuple[str, ...]) -> Iterator[Cell]:
    """In the order in which they are worked on: what the claim is about first."""
    free = ("mean of tokens", "textual inversion", "ours, no noise", "paper, no noise")
    for style in styles:
        for draw in range(tier.draws):
            yield Cell(style, 0, "no token", float("inf"), draw)
    for n in SIZES:
        for style in styles:
            for draw in range(tier.draws):
                for method in free:
                    yield Cell(style, n, method, float("inf"), draw)
            for epsilon in EPSILONS:
                for method in ("ours", "ours, nearest anchor", "paper", "mean", "selection"):
                    for draw in range(tier.draws):
                        yield Cell(style, n, method, epsilon, draw)
                for draw in range(tier.dp_sgd_draws):
                    yield Cell(style, n, "dp-sgd", epsilon, draw)


class Known:
    """Tokens that were learnt beforehand, by image: what the mechanism asks instead of learning them again."""

    def __init__(self, images: np.ndarray, tokens: np.ndarray) -> None:
        self.dimension, self.batch_size = tokens.shape[1], 64
        self._tokens = {_digest(image): token for image, token in zip(images, tokens, strict=True)}

    def __call__(self, images: np.ndarray, steps: int | None = None) -> np.ndarray:
        return np.stack([self._token(image) for image in images])

    def _token(self, image: np.ndarray) -> np.ndarray:
        """Of an image that is not known (the mechanism's self-test, padding): something of its own, never counted."""
        known = self._tokens.get(_digest(image))
        return np.full(self.dimension, float(image.mean())) if known is None else known


class KnownVotes:
    """The same for the votes: an image's scores are computed once."""

    def __init__(self, model: TextToImage, bank: StyleBank) -> None:
        self._score, self._held = style_votes(model, bank), {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        out = []
        for image in images:
            name = _digest(image)
            if name not in self._held:
                self._held[name] = self._score(image[None])[0]
            out.append(self._held[name])
        return np.stack(out)


class Bench:
    """One style's images, tokens, features and ledgers."""

    def __init__(self, options: argparse.Namespace, model: TextToImage, bank: StyleBank) -> None:
        self.options, self.model, self.bank, self.tier = options, model, bank, TIERS[options.tier]
        self.out: Path = options.out
        self.plan = InversionPlan(seed=0)
        self.pipeline = open_pipeline(options.model)
        self.encode = open_encoder("efficientnet-lite0")
        self.votes = KnownVotes(model, bank)
        self._images: dict[str, np.ndarray] = {}
        self._cached: dict[str, Any] = {}
        self._plans: dict[Any, Any] = {}

    def images(self, style: str) -> np.ndarray:
        """All portraits of a style, uint8 [N, 32, 32, 3]."""
        if style not in self._images:
            with np.load(self.options.data / f"portraits-{style}-{self.model.size}.npz") as held:
                self._images[style] = held["images"]
        return self._images[style]

    def stored(self, name: str, make: Any) -> np.ndarray:
        """An array that is computed once, kept in --out."""
        if name not in self._cached:
            path = self.out / f"{name}.npy"
            if not path.exists():
                np.save(path, make())
            self._cached[name] = np.load(path, allow_pickle=False)
        return self._cached[name]

    def tokens(self, style: str, n: int) -> np.ndarray:
        """One token for each of the first n images, float64 [n, D]; learnt in the parts that `SIZES` need."""
        parts, ends = [], (0, FIRST_IMAGES, PRIVATE_IMAGES)
        for start, end in itertools.pairwise(ends):
            if start < n:
                parts.append(
                    self.stored(f"tokens-{style}-{end}", lambda s=start, e=end: self.learnt(style, s, e))
                )
        return np.concatenate(parts)[:n]

    def learnt(self, style: str, start: int, end: int) -> np.ndarray:
        """Tokens of the images from `start` to `end`."""
        found, began, anchor = [], time.monotonic(), torch.from_numpy(self.bank.anchor)
        for first in range(start, end, self.plan.batch_size):
            some = self.images(style)[first : min(end, first + self.plan.batch_size)]
            found.append(invert(self.model, self.model.latents(some), anchor, self.plan))
            print(f"{style}: {first + len(some)} tokens, {time.monotonic() - began:.0f} s", flush=True)
        return np.concatenate(found)

    def features(self, style: str, start: int, count: int) -> np.ndarray:
        """EfficientNet-Lite0 features of real portraits."""
        return self.stored(
            f"features-{style}-{start}", lambda: self.encode(self.images(style)[start : start + count])
        )

    def others(self, style: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of the public styles and the other private ones, and which is which."""
        names = [name for name in PUBLIC + HELD_OUT if name != style]
        parts = [self.features(name, 1000, PUBLIC_EACH) for name in names]
        return np.concatenate(parts), np.repeat(np.arange(len(names)), [len(part) for part in parts])

    def protected(self, style: str, n: int) -> ProtectedImages:
        """The first n portraits behind the handle, on a ledger of their own."""
        key = f"{style}-{n}"
        if key not in self._cached:
            path = self.out / f"private-{key}.npz"
            if not path.exists():
                np.savez(path, images=self.images(style)[:n])
            ledger = Ledger.open(self.out / f"{key}.ledger.db", total=Budget(1e6, 0.5))
            self._cached[key] = ProtectedImages(
                path,
                ledger=ledger,
                size=self.model.size,
                channels=3,
                public_size=n,
                cache_dir=self.out / "cache",
            )
        return self._cached[key]

    def token(self, cell: Cell) -> np.ndarray | None:
        """The released token of a cell, float64 [D]; None for no token."""
        bank, center = self.bank, self.bank.anchor.astype(np.float64)
        if cell.method == "no token":
            return None
        own = self.tokens(cell.style, cell.n)
        if cell.method == "mean of tokens":
            return own.mean(0)
        if cell.method == "paper, no noise":
            return (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(0)
        if cell.method == "ours, no noise":
            shape = self.shape("dpagg-ti")
            along = (own - center) @ shape.basis
            lengths = np.linalg.norm(along, axis=1, keepdims=True)
            return center + shape.basis @ (along * np.minimum(1, shape.radius / lengths)).mean(0)
        if cell.method == "textual inversion":
            return self.stored(f"ti-{cell.style}-{cell.n}", lambda: self.inverted(cell))[0]
        private = self.protected(cell.style, cell.n)
        budget = Budget(cell.epsilon, DELTA)
        if cell.method == "dp-sgd":
            return self.dp_sgd(cell, private, budget)
        name = {"ours": "dpagg-ti", "ours, nearest anchor": "dpagg-ti"}.get(cell.method, cell.method)
        key = (name, cell.method, cell.epsilon, cell.n)
        if key not in self._plans:
            self._plans[key] = make_plan(
                name,
                budget,
                cell.n,
                self.shape(name),
                candidates=len(bank.names),
                select="nearest" in cell.method,
            )
        plan = self._plans[key]
        delta = 0.0 if plan.noise_multiplier is None else DELTA
        reservation = private.ledger.reserve(cell.key, plan.events, delta=delta)
        if plan.selection_epsilon is not None:
            chosen, _ = nearest_candidate(
                private, self.votes, len(bank.names), plan.selection_epsilon, reservation, batch_size=4
            )
            center = bank.tokens[chosen].astype(np.float64)
        elif name == "paper":
            center = plan.geometry.center
        if plan.noise_multiplier is None:
            return center
        known = Known(self.images(cell.style)[: cell.n], own)
        noisy, _ = vector_mean(private, known, plan.mean(center), reservation)
        return shrunk(noisy, center, plan)

    def shape(self, method: str) -> Any:
        """The geometry of a method, as the command line would choose it."""
        return geometry(method, self.bank.anchor, vocabulary(self.model), self.bank)  # type: ignore[arg-type]

    def inverted(self, cell: Cell) -> np.ndarray:
        latents = self.model.latents(self.images(cell.style)[: cell.n])
        plan = InversionPlan(steps=200, draws=16, seed=1)
        return invert_style(
            self.model,
            latents,
            torch.zeros(cell.n, dtype=torch.int64),
            1,
            torch.from_numpy(self.bank.anchor),
            plan,
        )

    def dp_sgd(self, cell: Cell, private: ProtectedImages, budget: Budget) -> np.ndarray:
        settings = DPSGDSettings(steps=50, expected_batch=24, draws=1)
        plan = dp_sgd_plan(budget, cell.n, settings)
        reservation = private.ledger.reserve(cell.key, [plan.planned()], delta=DELTA)
        start, self.model.autocast = (
            torch.from_numpy(self.bank.anchor),
            False,
        )  # engines agree in float32 only
        try:
            return dp_sgd_inversion(self.model, private, start, plan, reservation)[0].double().numpy()
        finally:
            self.model.autocast = True

    @torch.no_grad()
    def drawn(self, token: np.ndarray | None, seed: int) -> np.ndarray:
        """Pictures under a token for the content prompts, uint8 [pictures, 32, 32, 3], by the stock pipeline."""
        model, count = self.model, self.tier.pictures
        suffix = " in the style of {}" if token is not None else ""
        ids = model.prompts([CONTENT[i % len(CONTENT)] + suffix for i in range(count)])
        rows = None if token is None else torch.from_numpy(token).float().expand(count, -1)
        told = model.conditions(ids, rows)["encoder_hidden_states"]
        bare = model.conditions([part[:1] for part in model.prompts([""])], None)["encoder_hidden_states"]
        with torch.autocast(model.device.type, torch.bfloat16):
            pictures = self.pipeline(
                prompt_embeds=told, negative_prompt_embeds=bare.expand(count, -1, -1), guidance_scale=3.0,
                num_inference_steps=self.tier.steps, output_type="pt",
                generator=torch.Generator().manual_seed(1000 + seed),
            ).images  # fmt: skip
        return (pictures.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything about one cell; its pictures' first eight are kept for the contact sheet."""
        token = self.token(cell)
        pictures = self.drawn(token, cell.draw)
        found = self.encode(pictures)
        real = self.features(cell.style, PRIVATE_IMAGES, REFERENCE_IMAGES)
        others, which = self.others(cell.style)
        score = style_score(found, real, others, which)
        if cell.draw == 0:
            Image.fromarray(np.concatenate(list(pictures[:8]), 1)).save(self.out / "pictures" / _file(cell))
        mean = None if token is None or not cell.n else self.tokens(cell.style, cell.n).mean(0)
        center = self.bank.anchor.astype(np.float64)
        return {
            "key": cell.key, "kid": squared_mmd(found.astype(np.float64), real.astype(np.float64)),
            "hits": round(score.value * len(found)), "pictures": len(found), "chance": score.chance,
            "norm": None if token is None else float(np.linalg.norm(token)),
            "cosine_to_mean": None if mean is None or token is None else cosine(token, mean, center),
            "token": None if token is None else [round(float(x), 5) for x in token],
        }  # fmt: skip


def table(rows: dict[str, dict[str, Any]], tier: Tier, styles: tuple[str, ...]) -> str:
    """Markdown: for each style and n, a line for each method, a column for each ε."""
    lines = []
    for style in styles:
        floor = _mean([rows[c.key]["kid"] for c in cells(tier, styles) if c.style == style and c.n == 0])
        for n in sorted(SIZES):
            here = [c for c in cells(tier, styles) if c.style == style and c.n == n and c.key in rows]
            if not here:
                continue
            ceiling = _mean([rows[c.key]["kid"] for c in here if c.method == "mean of tokens"])
            lines += [
                f"\n**{style}, n = {n}**: KID without a token {floor:.3f}, of the non-private mean {ceiling:.3f}\n",
                "| method | " + " | ".join(f"ε = {e:g}" for e in EPSILONS) + " | ∞ |",
                "|---|" + "---|" * (len(EPSILONS) + 1),
            ]
            for method in dict.fromkeys(c.method for c in here):
                row = []
                for epsilon in (*EPSILONS, float("inf")):
                    found = [rows[c.key] for c in here if c.method == method and c.epsilon == epsilon]
                    row.append(_entry(found, floor, ceiling))
                lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _entry(found: list[dict[str, Any]], floor: float, ceiling: float) -> str:
    """Position (0 % non-private mean, 100 % no token) with its 95 % interval over draws, and the style score."""
    if not found:
        return ""
    from scipy.stats import t

    place = np.array([100 * (each["kid"] - ceiling) / (floor - ceiling) for each in found])
    half = (
        float(t.ppf(0.975, len(place) - 1) * place.std(ddof=1) / np.sqrt(len(place)))
        if len(place) > 1
        else 0.0
    )
    share = sum(each["hits"] for each in found) / sum(each["pictures"] for each in found)
    return f"{place.mean():.0f} ± {half:.0f} % ({100 * share:.0f})"


def sheet(bench: Bench, tier: Tier, style: str) -> None:
    """contact-STYLE.png: eight pictures a row; no token, then each method at n = 158, then n = 47. No private image."""
    wanted = [Cell(style, 0, "no token", float("inf"), 0)]
    for n, epsilon in ((158, 1.0), (47, 2.0)):
        wanted.append(Cell(style, n, "mean of tokens", float("inf"), 0))
        wanted += [
            Cell(style, n, method, epsilon, 0)
            for method in ("ours", "ours, nearest anchor", "selection", "mean", "paper", "dp-sgd")
        ]
    strips = [np.asarray(Image.open(p)) for c in wanted if (p := bench.out / "pictures" / _file(c)).exists()]
    Image.fromarray(np.concatenate(strips, 0)).save(bench.out / f"contact-{style}.png")


def main() -> None:
    """Work through the cells that are missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", choices=sorted(TIERS), default="cpu")
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--bank", type=Path, default=embedded_bank())
    parser.add_argument("--styles", nargs="+", default=list(HELD_OUT))
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop after so long; the same command goes on"
    )
    options = parser.parse_args()
    (options.out / "pictures").mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TextToImage.open(options.model, device=device, autocast=True)
    bank = StyleBank.load(options.bank)
    bank.check(model.fingerprint, model.dimension, model.vectors, str(options.bank))
    bench, path, styles = Bench(options, model, bank), options.out / "cells.jsonl", tuple(options.styles)
    held = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows, began = {row["key"]: row for row in held}, time.monotonic()
    todo = [cell for cell in cells(bench.tier, styles) if cell.key not in rows]
    for number, cell in enumerate(todo):
        if time.monotonic() - began > 60 * options.minutes:
            break
        rows[cell.key] = bench.measure(cell)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows[cell.key]) + "\n")
        print(
            f"{number + 1}/{len(todo)} {cell.key}: KID {rows[cell.key]['kid']:.4f}, "
            f"{rows[cell.key]['hits']} of {rows[cell.key]['pictures']}; {time.monotonic() - began:.0f} s", flush=True,
        )  # fmt: skip
    (options.out / "table.md").write_text(table(rows, bench.tier, styles), encoding="utf-8")
    for style in styles:
        sheet(bench, bench.tier, style)
    print(options.out / "table.md")


def _digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def _file(cell: Cell) -> str:
    return cell.key.replace("/", "-").replace(" ", "_").replace(",", "") + ".png"


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


if __name__ == "__main__":
    main()
