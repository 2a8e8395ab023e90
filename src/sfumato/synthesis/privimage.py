"""PrivImage (arXiv 2311.12850): choose public classes privately, train on them, fine-tune with DP-SGD.

    ProtectedImages + Ledger -> semantic histogram -> Selection -> public training -> DP-SGD -> Generator

`dpdm` (arXiv 2210.09929) is the same path without the public stages, `public-only` without the private ones.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.checkpoint import WeightAverage
from sfumato.data.images import ProtectedImages, PublicImages, same_content
from sfumato.diffusion import networks
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.sampling import Sampler
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.machine import best_defaults
from sfumato.privacy import mechanisms
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.dp_sgd import MECHANISM as DP_SGD
from sfumato.privacy.dp_sgd import dp_sgd
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.per_unit import Engine
from sfumato.report.facts import Stage
from sfumato.synthesis.classifier import scores, train_query
from sfumato.synthesis.planner import Plan, make_plan, measure_speeds
from sfumato.synthesis.presets import PRESETS, Preset
from sfumato.synthesis.selection import Selection, select_classes

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

    budget: for all of `fit`. method: "privimage", "dpdm" or "public-only". preset: settings. seconds: the
    time that `fit` and generating `num_images` should take. work_dir: where state is kept so that the same
    call resumes after an interruption; a temporary folder by default, which cannot. seed: public randomness
    only.
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
    ) -> None:
        self.budget, self.method, self.preset = budget, method, preset
        self.seconds, self.num_images, self.classifiers, self.seed = seconds, num_images, classifiers, seed
        if work_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sfumato-")
            work_dir = self._temporary.name
        self.work_dir = Path(work_dir)
        self.reservations: list[Any] = []
        self.stages: list[Stage] = []
        self.warnings: list[str] = []
        self.selection: Selection | None = None
        self.noisy_histogram: np.ndarray | None = None
        self.means: np.ndarray | None = None
        self.selected: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self.public_generator: Generator | None = None
        self.generator: Generator | None = None

    def prepare(self, private: ProtectedImages, public: PublicImages | None = None) -> Plan:
        """Check the inputs, count the units if their number is not declared, and fix the plan of the run.

        A count is charged to the ledger as a reservation of its own, since it sets later parameters.
        """
        self._check(private, public)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.reservations, self.warnings = [], []
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
        if units is None and self.method != "public-only":
            units, spent = self._count(private)
        path = self.work_dir / "plan.json"
        if path.exists():
            self.plan = Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
            self._same_run(path, spent)
        else:
            speeds = measure_speeds(
                self.network, self.edm, size=private.size, channels=private.channels, autocast=self._autocast
            )
            self.plan = make_plan(
                method=self.method,
                units=units or 1000,
                budget=Budget(self.budget.epsilon - spent, self.budget.delta),
                preset=self.preset,
                seconds=self.seconds,
                speeds=speeds,
                num_images=self.num_images or self.preset.num_images or units or 1000,
                num_labels=len(private.label_names),
                public_classes=None if public is None else len(public.label_names or ()),
                classifiers=self.classifiers,
            )
            _write(path, json.dumps(self.plan.to_json(), indent=1).encode())
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
        reservation = (
            self._reserve(private, "synthesize", plan.events(), plan.delta) if plan.events() else None
        )
        if plan.query:
            assert public is not None and reservation is not None
            self._select(private, public, reservation)
        elif public is not None:
            self.selected = _by_name(public, private.label_names, self.seed)
        if plan.means:
            assert reservation is not None
            self._average(private, reservation)
        self._train_publicly(private, public)
        if reservation is not None:
            self._train_privately(private, reservation)
            reservation.settle()
        self.generator = self._generator(private)
        return self

    def generate(
        self, num_images: int, *, labels: Any = None, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [num_images, H, W, C] and their labels; post-processing, free."""
        return self._fitted().generate(num_images, labels=labels, seed=seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the generator; see `Generator.save_pretrained`."""
        self._fitted().save_pretrained(folder)

    def _fitted(self) -> Generator:
        if self.generator is None:
            raise InputError("this model has not been fitted: call fit(private, public) first")
        return self.generator

    def _check(self, private: ProtectedImages, public: PublicImages | None) -> None:
        if self.method not in ("privimage", "dpdm", "public-only"):
            raise InputError(
                f"unknown method {self.method!r}: choose privimage, dpdm or public-only (--method)"
            )
        if self.method == "dpdm":
            return
        if public is None:
            raise InputError(
                f"--method {self.method} needs public images (--public); no budget was spent. Give some, or "
                "choose --method dpdm"
            )
        same_content(private, public)
        if self.method == "privimage" and (public.label_names is None or (public.labels < 0).any()):
            raise InputError(
                "the public images need a label each, since the query chooses among their classes; no budget was "
                "spent. Sort them into class folders, or choose --method dpdm"
            )

    def _reserve(self, private: ProtectedImages, label: str, events: list[PlannedEvent], delta: float) -> Any:
        path = self.work_dir / "run.json"
        if not path.exists():
            _write(path, json.dumps({"run": uuid.uuid4().hex}).encode())
        run = json.loads(path.read_text(encoding="utf-8"))["run"]
        reservation = private.ledger.reserve(label, events, delta=delta, key=f"{run}:{label}")
        self.reservations.append(reservation)
        return reservation

    def _count(self, private: ProtectedImages) -> tuple[int, float]:
        epsilon = SHARE_OF_COUNT * self.budget.epsilon
        event = PlannedEvent(mechanisms.COUNT, "number of units", mechanisms.count_event(epsilon))
        reservation = self._reserve(private, "count", [event], 0.0)
        units = self._answer(
            "count", reservation, lambda: np.array(mechanisms.count(private, epsilon, reservation)[0])
        )
        reservation.settle()
        return int(units), reservation.epsilon

    def _answer(self, mechanism: str, reservation: Any, ask: Callable[[], np.ndarray]) -> np.ndarray:
        """A one-shot mechanism's released value: from its file when it has been asked, else asked and saved."""
        path = self.work_dir / f"{mechanism}.npy"
        if path.exists():
            self._paid_here(path, mechanism, reservation, 1)
            return np.load(path, allow_pickle=False)
        if reservation.begun(mechanism):
            raise BudgetError(
                f"the run was stopped after {mechanism} was charged and before its answer was saved: that cost is "
                "spent and the answer is lost. `sfumato ledger close LEDGER ID --outputs-unseen` gives back what "
                "never began; then start again with another --out, on a ledger with budget left"
            )
        value, content = ask(), io.BytesIO()
        np.save(content, value, allow_pickle=False)
        _write(path, content.getvalue())
        return value

    def _paid_here(self, path: Path, mechanism: str, reservation: Any, units: int) -> None:
        """Refuse to go on from what this reservation did not pay for: it would be left out of the certificate."""
        if reservation.begun(mechanism) < units:
            raise LedgerError(
                f"{path} was made under another reservation than the ledger has for this run: another ledger, or an "
                "older copy of it, or run.json is gone. Put back the ledger that the run was started with, or start "
                "again with another --out; no budget was spent"
            )

    def _select(self, private: ProtectedImages, public: PublicImages, reservation: Any) -> None:
        started, p = time.monotonic(), self.plan.preset
        names = public.label_names or ()
        network = train_query(
            public.images, public.labels, len(names), steps=p.query_steps, seed=self.seed,
            saved=self.work_dir / "query.safetensors",
        )  # fmt: skip
        self.noisy_histogram = self._answer(
            mechanisms.SEMANTIC_HISTOGRAM, reservation,
            lambda: mechanisms.semantic_histogram(
                private, scores(network), len(names), p.top_k, p.query_noise, reservation
            )[0],
        )  # fmt: skip
        self.selection = select_classes(
            self.noisy_histogram, p.classes_per_label, noise_scale=p.query_noise * p.top_k**0.5
        )
        rows, labels, weights = self.selection.relabel(public.labels)
        self.selected = (np.asarray(public.images)[rows], labels, weights)
        self._stage(
            "semantic query", started, f"{len(names)} public classes, {p.query_steps} classifier steps"
        )

    def _average(self, private: ProtectedImages, reservation: Any) -> None:
        started, p = time.monotonic(), self.plan.preset
        self.means = self._answer(
            mechanisms.MEAN_IMAGES, reservation,
            lambda: mechanisms.mean_images(
                private, p.means_per_label, p.means_clip, p.means_noise, self.plan.units, reservation,
                center=self._center(private),
            )[0],
        )  # fmt: skip
        self._stage("mean images", started, f"{p.means_per_label} for each label")

    def _center(self, private: ProtectedImages) -> np.ndarray | float:
        """What the mean images are expected to look like: the selected public images of each label, else grey."""
        if self.selected is None:
            return 0.0
        images, labels, weights = self.selected
        per_label = np.zeros((len(private.label_names), 1, *images.shape[1:]))
        for label in range(len(private.label_names)):
            mine = labels == label
            share = (weights[mine] / weights[mine].sum()).reshape(-1, 1, 1, 1)
            per_label[label, 0] = (images[mine] * share).sum(0) / 127.5 - 1
        return per_label

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
                    ema_decay=p.public_ema, autocast=self._autocast,
                )  # fmt: skip
                steps = train(
                    self.network, images, labels, plan, weights=weights, description="public training",
                    checkpoint=self.work_dir / "public-training.safetensors", **common,
                )  # fmt: skip
            if self.means is not None:
                images, labels, weights = _with_means(self.means, self.selected)
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
        if public is not None and self.method != "public-only":
            import copy

            self.public_generator = self._generator(private, copy.deepcopy(self.network))

    def _train_privately(self, private: ProtectedImages, reservation: Any) -> None:
        started, p, no_label = time.monotonic(), self.plan.preset, len(private.label_names)
        done = self.work_dir / "private"
        plan = self.plan.dp_sgd()
        if (done / "config.json").exists():
            self._paid_here(done, DP_SGD, reservation, plan.steps)
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

    def _generator(self, private: ProtectedImages, network: Any = None) -> Generator:
        p = self.plan.preset
        sampler = Sampler(kind=p.sampler, steps=p.sampler_steps, sigma_max=p.sigma_max)  # type: ignore[arg-type]
        return Generator(network or self.network, private.label_names, self.edm, sampler, p.guidance)

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
        _write(
            self.work_dir / "stages.json", json.dumps([dataclasses.asdict(s) for s in self.stages]).encode()
        )


def _by_name(
    public: PublicImages, label_names: tuple[str, ...], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Public images without a query: classes that bear a label's name, else all images with random labels."""
    names = list(public.label_names or ())
    if all(name in names for name in label_names):
        chosen = Selection(
            tuple((names.index(name),) for name in label_names), tuple((1.0,) for _ in label_names)
        )
        rows, labels, weights = chosen.relabel(public.labels)
        return np.asarray(public.images)[rows], labels, weights
    labels = np.random.default_rng(seed).integers(len(label_names), size=len(public))
    return public.images, labels, np.ones(len(public))


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] (clipped) to uint8, any shape."""
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _with_means(
    means: np.ndarray, selected: tuple[np.ndarray, np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean images (float [L, m, H, W, C] in [-1, 1]) as training images, half of each batch when mixed."""
    flat = means.reshape(-1, *means.shape[2:])
    images = as_bytes(flat)
    labels = np.repeat(np.arange(means.shape[0]), means.shape[1])
    weights = np.full(len(images), 1.0 / len(images))
    if selected is None:
        return images, labels, weights
    return (
        np.concatenate([selected[0], images]),
        np.concatenate([selected[1], labels]),
        np.concatenate([selected[2] / selected[2].sum(), weights]),
    )


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
