"""What prompts are answered with when CIFAR-10 is private and Tiny-ImageNet public, at every mechanism and budget.

    python benchmarks/retrieve_cifar10.py --data ../shared/data --out DIR      # two hours of a core; resumable

The collection of retrieval_noise.py: 20,000 CIFAR-10 images as private, 20,000 of Tiny-ImageNet as public, in 64 public
directions of EfficientNet-Lite0. There is no joint space of texts and natural images here, so prompts are pictures:
Tiny-ImageNet's validation images of the 21 classes that belong to a class of CIFAR-10 (1,050 prompts). Real mechanisms
on a real ledger, T planned questions, δ = 1e-5; the test prompts are asked last, after T - 1,050 others, where records
have budgets of their own. The generator is trained first, in --minutes, on the public images and their mirror images,
by training/retrieval_generator.py's own loop; its autoencoder is the one of drawn portraits.

Measured of conditions: their distance from the mean of the 200 nearest private vectors, that of public neighbours alone
being 100 %; and the share that a classifier of CIFAR-10 (logistic regression on the private vectors, for evaluation
only) puts into the prompt's class. Of two pictures each for 200 prompts: kernel distance to 1,000 private images (KID),
precision and recall in EfficientNet-Lite0 features, and the same classifier's share. Writes table.md and a contact
sheet of generated pictures into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from retrieval_noise import RECORDS, collection, features, frame, images
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from pictures import as_tensor
from retrieval_generator import VAE, Material, nearest, train
from text_to_image import scheduler

from sfumato.encoders.encoder import open_encoder
from sfumato.evaluation.kernel_distance import squared_mmd
from sfumato.evaluation.neighbours import neighbour_metrics
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import BallPlan, NearestPlan, ball_sum, nearest_mean
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.progress import Progress
from sfumato.retrieval.conditions import ball_condition, nearest_condition
from sfumato.retrieval.generator import RetrievalGenerator
from sfumato.retrieval.overview import look_over
from sfumato.retrieval.plan import NEAREST_SHARE, Mechanism, make_plan
from sfumato.retrieval.public_side import PublicSide

DELTA, NEAREST, PLANNED_WITH, DRAWN, PICTURES, REFERENCE, STEPS = 1e-5, 200, 2_000, 200, 2, 1_000, 12
CLASSES = {
    "automobile": ("n02814533", "n03100240", "n03670208", "n04285008"), "bird": ("n01855672", "n02002724", "n02058221"),
    "cat": ("n02123045", "n02123394", "n02124075"), "deer": ("n02423022",),
    "dog": ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662"), "frog": ("n01641577", "n01644900"),
    "ship": ("n03662601",), "truck": ("n03796401", "n03977966"),
}  # fmt: skip
"""Synsets of Tiny-ImageNet that are, or look like, a class of CIFAR-10."""
CELLS: tuple[tuple[Mechanism, float, int], ...] = tuple(
    (mechanism, epsilon, queries)
    for queries in (2_000, 10_000)
    for epsilon in (10.0, 1.0)
    for mechanism in ("topk", "ball", "ball-filter")
)


class Bench:
    """Everything a cell needs, kept in a folder."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.private, public = collection(data, out)
        self.public = PublicSide.of(public.vectors, public.prompts[:PLANNED_WITH], public.encoder)
        self.along = frame(features("tiny", data / "tiny_imagenet_32_train.parquet", 0, RECORDS, out))
        self.asked, self.classes = self.prompts()
        order = np.random.default_rng(0).permutation(
            pq.read_metadata(data / "cifar10_train.parquet").num_rows
        )
        labels = np.array(pq.read_table(data / "cifar10_train.parquet", columns=["label"])["label"])[order][
            :RECORDS
        ]
        self.judge = LogisticRegression(max_iter=2000).fit(self.private, labels)
        near = np.argsort(-(self.asked @ self.private.T), axis=1)[:, :NEAREST]
        self.truth = self.private.astype(np.float64)[near].mean(1)
        self.alone = np.array(
            [self.public.center(z, self.public.count(NEAREST / RECORDS)) for z in self.asked]
        )

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        """(unit vectors float32 [1050, 64], number of the CIFAR-10 class of each)."""
        path = self.data / "tiny_imagenet_32_val.parquet"
        table = pq.read_table(path)
        order = np.random.default_rng(0).permutation(len(table))  # as `images` takes them
        synsets = _names(path)
        number = {synset: _names(self.data / "cifar10_train.parquet").index(name)
                  for name, group in CLASSES.items() for synset in group}  # fmt: skip
        mine = np.array(
            [number.get(synsets[i].split()[0], -1) for i in np.array(table["label"])[order].tolist()]
        )
        found = features("asked", path, 0, len(table), self.out)
        return self.along(found[mine >= 0]), mine[mine >= 0]

    def conditions(self, cell: tuple[Mechanism, float, int]) -> dict[str, np.ndarray]:
        """told, noise and without (what is told without asking) for the test prompts, kept in a file."""
        path = self.out / f"conditions-{cell[0]}-{cell[1]:g}-{cell[2]}.npz"
        if not path.exists():
            number = sum(1 for _ in self.out.glob("cell-*"))  # an interrupted one is left behind
            found = self.answers(cell, self.out / f"cell-{number}")
            np.savez(f"{path}.part.npz", **found)
            os.replace(f"{path}.part.npz", path)
        with np.load(path) as held:
            return dict(held)

    def answers(self, cell: tuple[Mechanism, float, int], folder: Path) -> dict[str, np.ndarray]:
        """The same, asked."""
        (mechanism, epsilon, queries), private, public = cell, self.private, self.public
        folder.mkdir(parents=True)
        held = ProtectedVectors.create(folder / "vectors", private.shape[1])
        names = [str(i) for i in range(len(private))]
        held.add(private, names, names)
        ledger = Ledger.open(folder / "ledger.db", total=Budget(epsilon, DELTA))
        (folder / "answers").mkdir()
        kept, budget = Answers(folder / "answers"), Budget(epsilon, DELTA)
        if mechanism != "topk":
            _, public, first = look_over(budget, held, public, ledger, kept, len(private))
            budget = Budget(epsilon - first.epsilon, DELTA - first.delta)
        plan = make_plan(mechanism, budget, queries, float(len(private)), public)
        reservation = kept.reserve(ledger, "retrieve", plan.events, budget.delta)
        count, query = public.count(min(NEAREST_SHARE, plan.share)), plan.query

        def ask(key: str, direction: np.ndarray) -> Any:
            if isinstance(query, NearestPlan):
                answer, _ = nearest_mean(held, direction, query, reservation, key)
                return nearest_condition(answer, public.center(direction, count), plan, False)
            assert isinstance(query, BallPlan)
            ball = public.ball(direction, plan.public_count(public))
            answer, _ = ball_sum(held, ball, query, reservation, key)
            return ball_condition(answer, public.center(direction, count), plan, False)

        if mechanism == "ball-filter":  # elsewhere what others asked changes nothing
            others = np.random.default_rng(5).integers(len(public.prompts), size=queries - len(self.asked))
            with Progress(f"{mechanism}, ε {epsilon:g}: other questions", total=len(others)) as progress:
                for number, row in enumerate(others):
                    direction = public.prompts[row].astype(np.float64)
                    noise = np.random.default_rng(number).normal(size=len(direction)) / 40  # none comes twice
                    ask(f"other {number}", (direction + noise) / np.linalg.norm(direction + noise))
                    progress.advance()
        told = [ask(f"mine {i}", z) for i, z in enumerate(self.asked.astype(np.float64))]
        return {
            "told": np.stack([each.vector for each in told]), "noise": np.array([each.noise for each in told]),
            "without": np.array([public.center(z, count) for z in self.asked]),
        }  # fmt: skip

    def generator(self, minutes: float) -> RetrievalGenerator:
        """Trained on the public images and their mirror images; goes on where it stopped."""
        vae = AutoencoderTiny.from_pretrained(
            VAE, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
        assert isinstance(vae, AutoencoderTiny)
        vae = vae.float().eval().requires_grad_(False)
        path = self.out / "material.safetensors"
        if not path.exists():
            pixels = images(self.data / "tiny_imagenet_32_train.parquet", 0, RECORDS)
            pixels = np.concatenate([pixels, pixels[:, :, ::-1]])
            with torch.no_grad():
                latents = [
                    vae.encode(as_tensor(part) * 2 - 1).latents.half() for part in np.array_split(pixels, 200)
                ]
            vectors = np.concatenate([self.public.vectors] * 2)
            save_file(
                {"latents": torch.cat(latents).contiguous(), "vectors": torch.from_numpy(vectors),
                 "near": nearest(vectors)}, path,
            )  # fmt: skip
        held = load_file(path)
        material = Material(held["latents"], held["vectors"], held["vectors"], held["near"], RECORDS)
        space: Any = SimpleNamespace(dimension=64, identity=self.public.encoder.replace("/", "-"))
        unet, condition = train(material, space, self.out, minutes, float(vae.config["scaling_factor"]))
        return RetrievalGenerator(unet, vae, scheduler(), condition, space.identity)

    def of_conditions(self, told: np.ndarray) -> tuple[float, float]:
        """(distance from the truth beside that of public neighbours, share in the prompt's class)."""
        error = (
            np.linalg.norm(told - self.truth, axis=1).mean()
            / np.linalg.norm(self.alone - self.truth, axis=1).mean()
        )
        return float(error), float((self.judge.predict(told) == self.classes).mean())

    def of_pictures(
        self, key: str, told: np.ndarray, noise: np.ndarray, made: RetrievalGenerator
    ) -> dict[str, float]:
        """KID, precision, recall and share in the prompt's class, of two pictures for each of 200 prompts."""
        chosen = np.random.default_rng(2).permutation(len(told))[:DRAWN]
        pictures = np.concatenate([
            made.generate(told[i].astype(np.float32), float(noise[i]), PICTURES, seed=int(i), steps=STEPS, guidance=2.0)
            for i in chosen
        ])  # fmt: skip
        sheet = np.concatenate(list(pictures[:: 2 * PICTURES][:16]), 1)
        Image.fromarray(sheet).save(self.out / f"pictures-{key}.png")
        encoder = open_encoder("efficientnet-lite0")
        found = np.concatenate([encoder(part) for part in np.array_split(pictures, 4)])
        real = features("cifar10", self.data / "cifar10_train.parquet", 0, RECORDS, self.out)[:REFERENCE]
        near = neighbour_metrics(real.astype(np.float64), found.astype(np.float64), k=5)
        right = self.judge.predict(self.along(found)) == np.repeat(self.classes[chosen], PICTURES)
        return {
            "kid": squared_mmd(found.astype(np.float64), real.astype(np.float64)), "precision": near.precision,
            "recall": near.recall, "right": float(right.mean()),
        }  # fmt: skip


def _names(path: Path) -> list[str]:
    return json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]["label"]["names"]


def main() -> None:
    """Ask what is missing, train, draw what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="of training the generator")
    parser.add_argument("--only", choices=["conditions", "generator"], help="this stage alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.data, options.out)
    if options.only == "generator":
        bench.generator(options.minutes)
        return
    still = np.zeros(len(bench.asked))
    ways = {
        ("public only", "–", "–"): (bench.alone, still, None),
        ("non-private", "–", "–"): (bench.truth, still, None),
    }
    for cell in CELLS:
        held = bench.conditions(cell)
        ways[cell[0], f"{cell[1]:g}", f"{cell[2]:,}"] = (held["told"], held["noise"], held["without"])
    if options.only == "conditions":
        return
    made, path, drawn = bench.generator(options.minutes), options.out / "pictures.json", {}
    if path.exists():
        drawn = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| method | ε | T | condition's error | right | without asking | KID | precision | recall | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way, (told, noise, without) in ways.items():
        key = "-".join(way).replace(" ", "-")
        if key not in drawn:
            drawn[key] = bench.of_pictures(key, told, noise, made)
            path.write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
        error, right = bench.of_conditions(told)
        alone = "–" if without is None else "{:.0%}, {:.0%}".format(*bench.of_conditions(without))
        row = drawn[key]
        lines.append(
            f"| {' | '.join(way)} | {error:.0%} | {right:.0%} | {alone} | {row['kid']:.2f} | {row['precision']:.2f} "
            f"| {row['recall']:.2f} | {row['right']:.0%} |"
        )
        print(lines[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
