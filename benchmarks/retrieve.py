"""What prompts are answered with: private portraits in a style that nothing public ever saw, at every mechanism and
budget.

    python benchmarks/data/portraits.py public
    python benchmarks/data/portraits.py held-out --count 20000
    python benchmarks/retrieve.py --tier cpu --out DIR      # resumable; an hour of a core
    python benchmarks/retrieve.py --tier full --out DIR     # more prompts, pictures and steps; for an accelerator

Private: 20,000 portraits of one held-out style behind a real index with a real ledger, T planned questions, ε over all
of them, δ = 1e-6; public: the embedded vectors of the other styles. Test prompts name attributes, never a style. They
are asked last, after T - P others where records have budgets of their own, so that these are as worn as they get.
Methods: public neighbours alone (λ = 0), top-k, ball, ball with per-record budgets, a codebook released once, what an
index knows of the whole without asking, and the mean of the 200 nearest private vectors without noise. Measured against
1,000 images of the private set: kernel distance (KID) in EfficientNet-Lite0 features, precision and recall; against the
prompts: the mean rank of a picture's own prompt among all, in the embedded joint space (1 first, 0.5 chance); and the
distance of conditions from the non-private ones, that of public only being 100 %. Position: the same of KID: 0 % is the
non-private mean, 100 % public only. Writes cells.jsonl, table.md and a contact sheet into
--out; no private image is in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from fetch import CACHE
from pictures import caption, read
from portraits import HELD_OUT, PUBLIC

from sfumato.encoders.encoder import open_encoder
from sfumato.encoders.text_image import open_text_image_encoder
from sfumato.evaluation.kernel_distance import squared_mmd
from sfumato.evaluation.neighbours import neighbour_metrics
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.progress import Progress
from sfumato.retrieval.build import build_index, release_codebook
from sfumato.retrieval.codebook import Codebook
from sfumato.retrieval.collection import Collection
from sfumato.retrieval.conditions import Condition, public_condition
from sfumato.retrieval.generator import RetrievalGenerator
from sfumato.retrieval.options import CodebookOptions, IndexOptions
from sfumato.retrieval.plan import NEAREST_SHARE
from sfumato.retrieval.prompts import portrait_prompts
from sfumato.retrieval.public_side import PublicSide, embedded_public

RECORDS, REFERENCE, NEAREST = 20_000, 1_000, 200
EPSILONS, QUERIES = (1.0, 10.0), (100, 10_000)
DELTA = 1e-6
MECHANISMS = ("topk", "ball", "ball-filter")


@dataclass(frozen=True)
class Tier:
    """prompts: asked for the figures. pictures: of each. steps: of sampling."""

    prompts: int
    pictures: int
    steps: int


TIERS = {"cpu": Tier(48, 4, 12), "full": Tier(256, 16, 50)}


@dataclass(frozen=True)
class Cell:
    """One way of answering; epsilon and queries are 0 where they do not apply."""

    style: str
    method: str
    epsilon: float
    queries: int

    @property
    def key(self) -> str:
        return f"{self.style}/{self.method}/{self.epsilon:g}/{self.queries}"


def cells(styles: tuple[str, ...]) -> Iterator[Cell]:
    """In the order in which they are worked on."""
    for style in styles:
        yield Cell(style, "public only", 0, 0)
        yield Cell(style, "mean and covariance alone", 2.0, 0)
        yield Cell(style, "non-private", 0, 0)
        for epsilon in reversed(EPSILONS):
            yield Cell(style, "codebook", epsilon, 0)
        for queries in QUERIES:
            for epsilon in reversed(EPSILONS):
                for method in MECHANISMS:
                    yield Cell(style, method, epsilon, queries)


class Bench:
    """Everything a cell needs, kept in a folder."""

    def __init__(self, data: Path, out: Path, tier: Tier, generator: Path | None) -> None:
        self.data, self.out, self.tier = data, out, tier
        self.encoder, self.features = open_text_image_encoder(), open_encoder("efficientnet-lite0")
        folder = (
            generator or Path(sys.modules[RetrievalGenerator.__module__].__file__ or "").parent / "portraits"
        )
        self.generator = RetrievalGenerator.from_pretrained(folder)
        chosen = np.random.default_rng(3).permutation(portrait_prompts())[: tier.prompts]
        self.prompts = [str(prompt) for prompt in chosen]
        self._real: dict[str, np.ndarray] = {}
        (out / "pictures").mkdir(parents=True, exist_ok=True)

    def images(self, style: str) -> np.ndarray:
        """The private images, uint8 [20,000, 32, 32, 3]."""
        with np.load(self.data / f"portraits-{style}-32.npz", allow_pickle=False) as held:
            return held["images"][:RECORDS]

    def vectors(self, style: str) -> np.ndarray:
        """Their vectors in the joint space, float32 [20,000, 64], kept in a file."""
        path = self.out / f"vectors-{style}.npy"
        if not path.exists():
            images, parts = self.images(style), []
            with Progress(f"encoding {style}", total=len(images), unit="images") as progress:
                for start in range(0, len(images), 512):
                    parts.append(self.encoder.images(images[start : start + 512]))
                    progress.advance(len(parts[-1]))
            np.save(path, np.concatenate(parts))
        return np.load(path)

    def real(self, style: str) -> np.ndarray:
        """Features of 1,000 of them."""
        if style not in self._real:
            images = self.images(style)[:REFERENCE]
            blocks = [self.features(images[i : i + 128]) for i in range(0, len(images), 128)]
            self._real[style] = np.concatenate(blocks).astype(np.float64)
        return self._real[style]

    def index(self, cell: Cell) -> Collection:
        """A real index of the style for this mechanism, budget and T."""
        private = self.out / f"private-{cell.style}.npz"
        if not private.exists():
            ids = np.array([f"{number:05d}" for number in range(RECORDS)])
            np.savez(private, vectors=self.vectors(cell.style), ids=ids)
        folder = self.out / f"index-{cell.key.replace('/', '-')}"
        ledger = self.out / f"{folder.name}.ledger.db"
        Ledger.open(ledger, total=Budget(2 * cell.epsilon + 1, 4 * DELTA))  # with room for the codebooks
        build_index(
            IndexOptions(
                str(private), cell.epsilon, str(folder), queries=cell.queries, delta=DELTA, ledger=str(ledger),
                mechanism=cell.method, public_size=RECORDS,
            )
        )  # fmt: skip
        return Collection.open(folder)

    def conditions(self, cell: Cell) -> list[Condition]:
        """What the generator is told for each test prompt."""
        if cell.method in ("public only", "mean and covariance alone", "non-private"):
            return self.without_budget(cell)
        if cell.method == "codebook":
            return self.codebook(cell)
        collection = self.index(cell)
        if cell.method != "ball-filter":  # what others asked changes nothing here
            return [collection.condition(prompt) for prompt in self.prompts]
        left = collection.status()["queries_left"] - len(self.prompts)
        with Progress(f"{cell.key}: other questions", total=max(left, 0)) as progress:
            for prompt in self.others(left):
                if collection.status()["queries_left"] <= len(self.prompts):
                    break
                collection.condition(prompt)
                progress.advance()
        return [collection.condition(prompt) for prompt in self.prompts]

    def others(self, count: int) -> Iterator[str]:
        """Different prompts as others would ask them, with styles and without, none of them a test prompt."""
        rng, seen = np.random.default_rng(7), set(self.prompts)
        pictures = read(self.data, PUBLIC, 32)
        while count > 0:
            row = int(rng.integers(len(pictures.images)))
            style = pictures.styles[pictures.style[row]] if rng.random() < 0.5 else None
            prompt = caption(pictures.attributes[row], style, "plain", rng)
            if prompt not in seen:
                seen.add(prompt)
                count -= 1
                yield prompt

    def without_budget(self, cell: Cell) -> list[Condition]:
        """Public neighbours alone, what the index knows of the whole (ε = 2), or the mean of the private neighbours."""
        if cell.method == "non-private":
            private = self.vectors(cell.style).astype(np.float64)
            nearest = np.argsort(-(self.encoder.texts(self.prompts).astype(np.float64) @ private.T), 1)[
                :, :NEAREST
            ]
            return [Condition(private[rows].mean(0).astype(np.float32), 0.0, True, False) for rows in nearest]
        public, count = PublicSide.load(embedded_public()), None
        if cell.method == "mean and covariance alone":
            index = Collection.open(self.out / f"index-{cell.style}-ball-filter-10-{QUERIES[0]}")
            public, count = index.public, index.public.count(NEAREST_SHARE)
        count = count or public.count(NEAREST / RECORDS)
        return [public_condition(public.center(z, count)) for z in self.encoder.texts(self.prompts)]

    def codebook(self, cell: Cell) -> list[Condition]:
        """A codebook for an ε of its own, beside what the index has reserved for questions."""
        base = self.out / f"index-{cell.style}-ball-filter-10-{QUERIES[0]}"
        folder = self.out / f"codebook-{cell.key.replace('/', '-')}"
        release_codebook(CodebookOptions(str(base), cell.epsilon, str(folder), delta=DELTA))
        codes = Codebook.open(folder / "release")
        return [codes.condition(prompt) for prompt in self.prompts]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything about one cell."""
        told = self.conditions(cell)
        pictures = np.concatenate([
            self.generator.generate(
                each.vector, each.noise, self.tier.pictures, seed=number, steps=self.tier.steps, guidance=2.0
            )
            for number, each in enumerate(told)
        ])  # fmt: skip
        Image.fromarray(np.concatenate(list(pictures[:: self.tier.pictures][:12]), 1)).save(
            self.out / "pictures" / f"{cell.key.replace('/', '-')}.png"
        )
        found, real = self.features(pictures).astype(np.float64), self.real(cell.style)
        near = neighbour_metrics(real, found, k=5)
        scores = self.encoder.images(pictures) @ self.encoder.texts(self.prompts).T
        own = np.repeat(np.arange(len(told)), self.tier.pictures)
        mine = scores[np.arange(len(own)), own]
        rank = (scores < mine[:, None]).sum(1) / (len(told) - 1)
        vectors = np.stack([each.vector for each in told])
        np.save(self.out / "pictures" / f"{cell.key.replace('/', '-')}-conditions.npy", vectors)
        return {
            "key": cell.key, "kid": squared_mmd(found, real), "precision": near.precision, "recall": near.recall,
            "rank": float(rank.mean()), "private": float(np.mean([each.private for each in told])),
            "noise": float(np.mean([each.noise for each in told])),
        }  # fmt: skip


def table(rows: dict[str, dict[str, Any]], out: Path, styles: tuple[str, ...]) -> str:
    """Markdown, one block a style."""
    lines: list[str] = []
    for style in styles:
        here = [cell for cell in cells((style,)) if cell.key in rows]
        ends = {
            cell.method: rows[cell.key]["kid"]
            for cell in here
            if cell.method in ("public only", "non-private")
        }
        if len(ends) < 2:
            continue
        truth = _conditions(out, Cell(style, "non-private", 0, 0))
        center = _conditions(out, Cell(style, "public only", 0, 0))
        lines += [
            f"\n**{style}**: KID of public only {ends['public only']:.3f}, of the non-private mean "
            f"{ends['non-private']:.3f}\n",
            "| method | ε | T | position | KID | precision | recall | prompt's rank | condition's error | private |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for cell in here:
            row = rows[cell.key]
            place = 100 * (row["kid"] - ends["non-private"]) / (ends["public only"] - ends["non-private"])
            wrong = np.linalg.norm(_conditions(out, cell) - truth, axis=1).mean()
            error = wrong / np.linalg.norm(center - truth, axis=1).mean()
            lines.append(
                f"| {cell.method} | {_or_dash(cell.epsilon)} | {_or_dash(cell.queries)} | {place:.0f} % "
                f"| {row['kid']:.3f} | {row['precision']:.2f} | {row['recall']:.2f} | {row['rank']:.2f} "
                f"| {error:.0%} | {row['private']:.0%} |"
            )  # fmt: skip
    return "\n".join(lines) + "\n"


def _or_dash(value: float) -> str:
    return f"{value:,g}" if value else "–"


def _conditions(out: Path, cell: Cell) -> np.ndarray:
    return np.load(out / "pictures" / f"{cell.key.replace('/', '-')}-conditions.npy").astype(np.float64)


def main() -> None:
    """Work through the cells that are missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tier", choices=sorted(TIERS), default="cpu")
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--generator", type=Path, help="folder of a generator; default: the embedded one")
    parser.add_argument("--styles", nargs="+", default=list(HELD_OUT))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    styles, path = tuple(options.styles), options.out / "cells.jsonl"
    rows = {}
    if path.exists():
        rows = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    bench = Bench(options.data, options.out, TIERS[options.tier], options.generator)
    wanted = list(cells(styles))
    for style in styles:  # whose neighbourhoods the two ends are measured in
        bench.index(Cell(style, "ball-filter", 10.0, QUERIES[0]))
    for number, cell in enumerate(wanted, start=1):
        if cell.key in rows:
            continue
        began = time.monotonic()
        rows[cell.key] = bench.measure(cell)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(rows[cell.key]) + "\n")
        row = rows[cell.key]
        print(
            f"{number}/{len(wanted)} {cell.key}: KID {row['kid']:.3f}, rank {row['rank']:.2f}, "
            f"private {row['private']:.0%}; {time.monotonic() - began:.0f} s",
            flush=True,
        )
    text = table(rows, options.out, styles)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    for style in styles:
        strips = [
            options.out / "pictures" / f"{c.key.replace('/', '-')}.png"
            for c in cells((style,))
            if c.key in rows
        ]
        sheet = np.concatenate([np.asarray(Image.open(strip)) for strip in strips], 0)
        Image.fromarray(sheet).save(options.out / f"contact-{style}.png")


if __name__ == "__main__":
    main()
