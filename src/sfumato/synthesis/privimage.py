"""PrivImage (arXiv 2311.12850): choose public classes privately, train on them, fine-tune with DP-SGD.

    ProtectedImages + Ledger -> semantic histogram -> Selection -> public training -> DP-SGD -> Generator

The methods it is compared with (`methods.METHODS`) are the same path with stages left out or exchanged.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.checkpoint import WeightAverage
from sfumato.data.files import write_whole
from sfumato.data.images import ProtectedImages, PublicImages, same_content
from sfumato.diffusion import networks
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.encoders.encoder import open_encoder
from sfumato.errors import InputError
from sfumato.machine import best_defaults
from sfumato.privacy import mechanisms
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.dp_sgd import MECHANISM as DP_SGD
from sfumato.privacy.dp_sgd import dp_sgd
from sfumato.privacy.per_unit import Engine
from sfumato.report.facts import Stage
from sfumato.synthesis import public_images
from sfumato.synthesis.classifier import scores, train_query
from sfumato.synthesis.methods import METHODS
from sfumato.synthesis.planner import Plan, Speeds, make_plan, measure_speeds
from sfumato.synthesis.presets import PRESETS, Preset
from sfumato.synthesis.private_evolution import Evolved, evolve
from sfumato.synthesis.public_images import Labelled
from sfumato.synthesis.selection import Selection, random_classes, select_classes

MODEL_OF_PE = (
    "The model in this release is the public generator and has learnt nothing from the sensitive images: they voted "
    "for the released images alone."
)
# Files of a run that rest on what its reservation paid for, where public training follows a query or mean images.
FROM_ANSWERS = ("public", "public-training.safetensors", "warm-up.safetensors")
IMAGES = "images.npz"  # the release's, drawn once
SHARE_OF_COUNT = 0.02  # of epsilon, for a noisy count of the units when their number is not declared


class PrivImage:
    """A differentially private image generator.

    >>> model = PrivImage(budget=Budget(epsilon=4, delta=1e-6)).fit(private, public)
    >>> model.save_pretrained("runs/a/release/model")
    >>> images, labels = model.generate(10_000, seed=0)

    Formal guarantee. All that `fit` learns about the protected images, and so every attribute, every image
    generated and every file saved, is (budget.epsilon, budget.delta)-differentially private for adding or
    removing one unit, as declared in `ProtectedImages`. What it did is in `reservations`, in the images'
    ledger.

    budget: for all of `fit`. method: one of `methods.METHODS`. preset: settings. seconds: the time that `fit`
    and generating `num_images` should take, at the speed of this machine, or at `speeds` where they are given
    (then the same work is done wherever it runs). work_dir: where state is kept so that the same call resumes
    after an interruption; a temporary folder by default, which cannot. seed: public randomness only.
    """

    def __init__(
        self,
        *,
        budget: Budget,
        method: str = "privimage",
        preset: Preset = PRESETS["demo"],
        seconds: float = 600.0,
        num_images: int | None = None,
        classifiers: int = 0,
        work_dir: str | Path | None = None,
        seed: int = 0,
        speeds: Speeds | None = None,
    ) -> None:
        self.budget, self.method, self.preset = budget, method, preset
        self.seconds, self.num_images, self.classifiers, self.seed = seconds, num_images, classifiers, seed
        if work_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sfumato-")
            work_dir = self._temporary.name
        self.work_dir, self.speeds = Path(work_dir), speeds
        self._answers = Answers(self.work_dir)
        self.stages: list[Stage] = []
        self.warnings: list[str] = []
        self.selection: Selection | None = None
        self.noisy_histogram: np.ndarray | None = None
        self.means: np.ndarray | None = None
        self.selected: Labelled | None = None
        self.public_generator: Generator | None = None
        self.generator: Generator | None = None
        self.population: Evolved | None = None

    @property
    def reservations(self) -> list[Any]:
        """What was charged to the images' ledger, in order."""
        return self._answers.reservations

    def prepare(self, private: ProtectedImages, public: PublicImages | None = None) -> Plan:
        """Check the inputs, count the units if their number is not declared, and fix the plan of the run.

        A count is charged to the ledger as a reservation of its own, since it sets later parameters.
        """
        self._check(private, public)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self._answers, self.warnings = Answers(self.work_dir), []
        stages = self.work_dir / "stages.json"
        if stages.exists():
            self.stages = [Stage(**stage) for stage in json.loads(stages.read_text(encoding="utf-8"))]
        torch.manual_seed(self.seed)
        defaults = best_defaults()
        self._autocast = defaults.public_dtype == "bfloat16"
        self._engine: Engine = defaults.engine  # type: ignore[assignment]
        torch.set_num_threads(defaults.threads)
        self.edm = EDM()
        self.network = networks.unet(
            self.preset.network,
            size=private.size,
            channels=private.channels,
            num_labels=len(private.label_names),
        ).to(defaults.device)
        units = private.public_size
        spent = 0.0
        if units is None and METHODS[self.method].private != "none":
            units, spent = self._count(private)
        path = self.work_dir / "plan.json"
        if path.exists():
            self.plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
            self._same_run(path, spent)
        else:
            speeds = self.speeds or measure_speeds(
                self.network, self.edm, size=private.size, channels=private.channels, autocast=self._autocast
            )
            self.plan = make_plan(
                method=self.method,
                units=units or 1000,
                budget=Budget(self.budget.epsilon - spent, self.budget.delta),
                preset=self.preset,
                seconds=self.seconds,
                speeds=speeds,
                count_work=self.speeds is not None,
                num_images=self.num_images or self.preset.num_images or units or 1000,
                num_labels=len(private.label_names),
                public_classes=None if public is None else len(public.label_names or ()),
                classifiers=self.classifiers,
            )
            write_whole(path, json.dumps(self.plan.to_json(), indent=1).encode())
        if units is not None and (warning := delta_warning(self.budget.delta, units)):
            self.warnings.append(warning)
        return self.plan

    def _same_run(self, path: Path, spent: float) -> None:
        planned = self.plan.method, self.plan.epsilon, self.plan.delta
        if planned != (self.method, self.budget.epsilon - spent, self.budget.delta):
            raise InputError(
                f"{path} holds the plan of a run by {self.plan.method} for epsilon {self.plan.epsilon + spent:g}, "
                f"delta {self.plan.delta:g}; no budget was spent now. Repeat that run to resume it, or use another "
                "folder"
            )

    def fit(self, private: ProtectedImages, public: PublicImages | None = None) -> PrivImage:
        """Learn the generator. Calling again with the same `work_dir` goes on where it stopped.

        Raises InputError for unusable inputs, BudgetError when the ledger has too little left; both before
        anything is spent.
        """
        plan = self.prepare(private, public)
        reservation = None
        if plan.events():
            reservation = self._answers.reserve(private.ledger, "synthesize", plan.events(), plan.delta)
            rests = FROM_ANSWERS if plan.query or plan.means else ()
            self._answers.own(reservation, (*rests, "private", IMAGES))
        self.selected = self._choose(private, public, reservation)
        if plan.means:
            assert reservation is not None
            self._average(private, reservation)
        self._train_publicly(private, public)
        if reservation is not None:
            if METHODS[self.method].private == "votes":
                self._evolve(private, reservation)
            else:
                self._train_privately(private, reservation)
            reservation.settle()
        self.generator = self._generator(private)
        return self

    def generate(
        self, num_images: int, *, labels: Any = None, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [num_images, H, W, C] and their labels; post-processing, free.

        By method "pe" these are images that were voted for, at most as many as the plan made.
        """
        if self.population is not None:
            return self.population.take(num_images, labels)
        return self._fitted().generate(num_images, labels=labels, seed=seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the generator; see `Generator.save_pretrained`."""
        self._fitted().save_pretrained(folder)

    def _fitted(self) -> Generator:
        if self.generator is None:
            raise InputError("this model has not been fitted: call fit(private, public) first")
        return self.generator

    def _check(self, private: ProtectedImages, public: PublicImages | None) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)} (--method)")
        wanted = METHODS[self.method].public
        if wanted == "none":
            return
        if public is None:
            raise InputError(
                f"--method {self.method} needs public images (--public); no budget was spent. Give some, or "
                "choose --method dpdm"
            )
        same_content(private, public)
        if wanted in ("queried", "random") and (public.label_names is None or (public.labels < 0).any()):
            raise InputError(
                f"the public images need a label each, since --method {self.method} chooses among their classes; no "
                "budget was spent. Sort them into class folders, or choose --method dpdm"
            )

    def _count(self, private: ProtectedImages) -> tuple[int, float]:
        return self._answers.count(private, SHARE_OF_COUNT * self.budget.epsilon)

    def _choose(
        self, private: ProtectedImages, public: PublicImages | None, reservation: Any
    ) -> Labelled | None:
        """The public images to start from, under sensitive labels; None without any."""
        names, wanted = private.label_names, METHODS[self.method].public
        if public is None or wanted == "none":
            return None
        if wanted == "all":
            return public_images.all_of_them(public, len(names), self.seed)
        if wanted == "named":
            return public_images.by_name(public, names, self.seed)
        if wanted == "queried":
            self._select(private, public, reservation)
        else:
            per_label = self.plan.preset.classes_per_label
            self.selection = random_classes(len(names), len(public.label_names or ()), per_label, self.seed)
        assert self.selection is not None
        return public_images.selected(public, self.selection)

    def _select(self, private: ProtectedImages, public: PublicImages, reservation: Any) -> None:
        started, p = time.monotonic(), self.plan.preset
        names = public.label_names or ()
        network = train_query(
            public.images, public.labels, len(names), steps=p.query_steps, seed=self.seed,
            saved=self.work_dir / "query.safetensors",
        )  # fmt: skip
        self.noisy_histogram = self._answers.ask(
            mechanisms.SEMANTIC_HISTOGRAM, reservation,
            lambda: mechanisms.semantic_histogram(
                private, scores(network), len(names), p.top_k, p.query_noise, reservation
            )[0],
        )  # fmt: skip
        self.selection = select_classes(
            self.noisy_histogram, p.classes_per_label, noise_scale=p.query_noise * p.top_k**0.5
        )
        self._stage(
            "semantic query", started, f"{len(names)} public classes, {p.query_steps} classifier steps"
        )

    def _average(self, private: ProtectedImages, reservation: Any) -> None:
        started, p = time.monotonic(), self.plan.preset
        self.means = self._answers.ask(
            mechanisms.MEAN_IMAGES, reservation,
            lambda: mechanisms.mean_images(
                private, p.means_per_label, p.means_clip_norm, p.means_noise, self.plan.units, reservation,
                center=public_images.centers(self.selected, len(private.label_names)),
            )[0],
        )  # fmt: skip
        self._stage("mean images", started, f"{p.means_per_label} for each label")

    def _train_publicly(self, private: ProtectedImages, public: PublicImages | None) -> None:
        """Public training on the selected images, then a warm-up on the mean images mixed in."""
        started, p, no_label = time.monotonic(), self.plan.preset, len(private.label_names)
        done, steps = self.work_dir / "public", 0
        if (done / "config.json").exists():
            self._load(done)
        else:
            common = {"edm": self.edm, "no_label": no_label, "seed": self.seed}
            if self.selected is not None:
                images, labels, weights = self.selected
                plan = TrainingPlan(
                    steps=self.plan.public_steps, batch=p.public_batch, lr=p.public_lr,
                    seconds=self.plan.public_seconds or float("inf"), label_dropout=p.label_dropout,
                    ema_decay=p.public_ema, autocast=self._autocast, perturbation=p.perturbation,
                )  # fmt: skip
                steps = train(
                    self.network, images, labels, plan, weights=weights, description="public training",
                    checkpoint=self.work_dir / "public-training.safetensors", **common,
                )  # fmt: skip
            if self.means is not None:
                images, labels, weights = public_images.with_means(self.means, self.selected)
                plan = TrainingPlan(
                    steps=p.means_steps, batch=p.public_batch, lr=p.public_lr / 2, label_dropout=p.label_dropout,
                    ema_decay=0.95, autocast=self._autocast,
                )  # fmt: skip
                train(
                    self.network, images, labels, plan, weights=weights, description="warm-up on mean images",
                    checkpoint=self.work_dir / "warm-up.safetensors", **common,
                )  # fmt: skip
            self._save(done, private)
            if self.selected is not None:
                self._stage("public training", started, f"{steps} steps of {p.public_batch} images")
        self.network.eval()
        if self.selected is not None and METHODS[self.method].private != "none":
            import copy

            self.public_generator = self._generator(private, copy.deepcopy(self.network))

    def _train_privately(self, private: ProtectedImages, reservation: Any) -> None:
        started, p, no_label = time.monotonic(), self.plan.preset, len(private.label_names)
        done = self.work_dir / "private"
        plan = self.plan.dp_sgd()
        if (done / "config.json").exists():
            self._answers.paid_here(done, DP_SGD, reservation, plan.steps)
            self._load(done)
            return

        def make_rows(
            images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
        ) -> dict[str, Any]:
            return self.edm.rows(images, labels, generator, no_label=no_label, label_dropout=p.label_dropout)

        average = WeightAverage(self.network, p.private_ema)
        dp_sgd(
            self.network, private, plan, reservation, make_rows=make_rows, row_loss=self.edm.row_loss,
            optimizer=torch.optim.Adam(self.network.parameters(), lr=p.private_lr),
            lr=lambda step: p.private_lr * (0.55 + 0.45 * float(np.cos(np.pi * step / plan.steps))),
            ema=average, checkpoint_dir=self.work_dir, engine=self._engine,
        )  # fmt: skip
        average.copy_to(self.network)
        self._save(done, private)
        self._stage("DP-SGD", started, f"{plan.steps} steps, {plan.rows_per_unit} noise levels a unit")

    def _evolve(self, private: ProtectedImages, reservation: Any) -> None:
        started = time.monotonic()
        self.population = evolve(
            self._generator(private), private, self.plan.evolution(), reservation,
            open_encoder(self.plan.preset.votes_encoder), work_dir=self.work_dir, seed=self.seed,
            num_images=self.num_images or self.plan.preset.num_images or self.plan.units,
        )  # fmt: skip
        self.warnings.append(MODEL_OF_PE)
        if (lost := self.population.iterations_begun - self.population.iterations_applied) > 0:
            self.warnings.append(
                f"{lost} of {self.population.iterations_begun} votes were charged and their answers lost in a crash: "
                "the images were improved that often less."
            )
        self._stage("Private Evolution", started, f"{self.plan.preset.votes} votes of each unit")

    def _generator(self, private: ProtectedImages, network: Any = None) -> Generator:
        p = self.plan.preset
        return Generator(network or self.network, private.label_names, self.edm, p.sampling(), p.guidance)

    def _save(self, folder: Path, private: ProtectedImages) -> None:
        partial = folder.with_name(folder.name + ".partial")
        self._generator(private).save_pretrained(partial)
        os.replace(partial, folder)

    def _load(self, folder: Path) -> None:
        loaded = Generator.from_pretrained(folder).network
        self.network.load_state_dict(loaded.state_dict())

    def _stage(self, name: str, started: float, detail: str) -> None:
        """Remember a stage on disk: a resumed run does not repeat it, its report still tells of it."""
        stages = {stage.name: stage for stage in self.stages}
        before = stages[name].seconds if name in stages else 0.0
        stages[name] = Stage(name, before + time.monotonic() - started, detail)
        self.stages = list(stages.values())
        write_whole(
            self.work_dir / "stages.json", json.dumps([dataclasses.asdict(s) for s in self.stages]).encode()
        )
