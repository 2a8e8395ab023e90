"""Rules of a whole run as checks: each passes on the real code and fails on the bugs planted against it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.data.images import ProtectedImages, PublicImages
from sfumato.errors import InputError, LedgerError
from sfumato.privacy import mechanisms
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.randomness import SecureStream
from sfumato.report.certificate import certificate, verify_certificate
from sfumato.synthesis import privimage as module
from sfumato.synthesis.planner import Speeds
from sfumato.synthesis.presets import Preset
from sfumato.synthesis.privimage import PrivImage

BUDGET = Budget(8, 1e-5)
QUICK = Preset(
    size=8, query_steps=2, public_steps=1, public_batch=4, enough_steps=2, noise_levels=1, sampler_steps=2,
    top_k=2, classes_per_label=2, means_per_label=1, means_steps=1, time_bound=False,
)  # fmt: skip


class Quiet:
    def __init__(self, *given: Any, **more: Any) -> None: ...
    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *given: Any) -> None: ...
    def advance(self, *given: Any) -> None: ...


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds as if measured, noise beyond what is needed, no check of the engine: they have tests of their own."""
    monkeypatch.setattr("sfumato.privacy.accounting.calibrate", lambda events, budget: 4.0)
    monkeypatch.setattr(module, "measure_speeds", lambda *given, **more: Speeds(1e4, 1e4, 1e4))
    monkeypatch.setattr("sfumato.privacy.dp_sgd._check", lambda *given: None)
    monkeypatch.setattr("sfumato.privacy.dp_sgd.Progress", Quiet)


def run(
    folder: Path, *, size: int | None = None, units: int = 60, ledger: str = "x.db", work: str = "work",
    budget: Budget = BUDGET, total: Budget = BUDGET, prepare_only: bool = False,
) -> tuple[PrivImage, Ledger]:  # fmt: skip
    """A whole `fit` as `sfumato synthesize` does it (prepare, then fit), on random images."""
    for name, count, labels in (("private", units, 2), ("public", 80, 5)):
        draw = np.random.default_rng(count)
        if not (folder / f"{name}{count}.npz").exists():
            images = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
            np.savez(folder / f"{name}{count}.npz", images=images, labels=np.arange(count) % labels)
    account = Ledger.open(folder / ledger, total=total)
    shape: dict[str, Any] = {"size": 8, "channels": 1, "cache_dir": folder / "cache"}
    private = ProtectedImages(folder / f"private{units}.npz", ledger=account, public_size=size, **shape)
    public = PublicImages(folder / "public80.npz", **shape)
    model = PrivImage(budget=budget, preset=QUICK, num_images=4, work_dir=folder / work, seconds=60)
    model.prepare(private, public)
    return (model if prepare_only else model.fit(private, public)), account


def certified(model: PrivImage, account: Ledger) -> dict[str, Any]:
    return certificate(
        model.reservations, unit="image", public_size=model.plan.units, budget=model.budget, software={},
        ledger_head=account.head,
    )  # fmt: skip


# --- rule 7: everything that touched the data is in the ledger and in the certificate, once


def everything_is_accounted(folder: Path) -> bool:
    """What mechanisms did, what the ledger holds and what the certificate states are the same, within budget."""
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("count", "semantic_histogram", "mean_images"):
            real = getattr(mechanisms, name)

            def spied(*given: Any, _name: str = name, _real: Any = real, **more: Any) -> Any:
                ran.append(_name)
                return _real(*given, **more)

            patch.setattr(mechanisms, name, spied)
        real_sum = __import__("sfumato.privacy.dp_sgd", fromlist=["x"])._sum_over_batch
        patch.setattr(
            "sfumato.privacy.dp_sgd._sum_over_batch",
            lambda *given: (ran.append("dp_sgd"), real_sum(*given))[1],
        )
        model, account = run(folder)
    begun = [
        planned.mechanism
        for reservation in account.reservations()
        for planned in reservation.planned
        for _ in range(reservation.begun(planned.mechanism))
    ]
    claim = certified(model, account)
    stated = [
        entry["mechanism"]
        for part in claim["reservations"]
        for entry in part["events"]
        for _ in range(entry["event"].get("count", 1))
    ]
    account.verify(claim["ledger"]["head"])
    spent = account.spent
    return (
        sorted(ran) == sorted(begun) == sorted(stated)
        and verify_certificate(claim).ok
        and math.isclose(claim["epsilon"], spent.epsilon, rel_tol=1e-12)
        and math.isclose(claim["delta"], spent.delta, rel_tol=1e-12)
    )


def test_everything_is_accounted(tmp_path: Path):
    assert everything_is_accounted(tmp_path)


def caught(check: Callable[[Path], bool], folder: Path) -> bool:
    try:
        return not check(folder)
    except Exception:
        return True


def test_a_query_left_out_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sfumato.synthesis import planner

    real = planner._one_shot
    monkeypatch.setattr(planner, "_one_shot", lambda preset, **more: real(preset, **{**more, "query": False}))
    assert caught(everything_is_accounted, tmp_path)


def test_a_query_asked_twice_and_charged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = mechanisms.semantic_histogram

    class Free:
        def begin(self, *given: Any) -> None: ...

    def twice(*given: Any, **more: Any) -> Any:
        mechanisms.count(given[0], 1.0, Free())  # type: ignore[arg-type]
        return real(*given, **more)

    monkeypatch.setattr(mechanisms, "semantic_histogram", twice)
    assert caught(everything_is_accounted, tmp_path)


def test_the_count_left_out_of_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = PrivImage._count

    def forgetful(self: PrivImage, private: Any) -> Any:
        found = real(self, private)
        self.reservations.clear()
        return found

    monkeypatch.setattr(PrivImage, "_count", forgetful)
    assert caught(everything_is_accounted, tmp_path)


# --- rules 10, 13 and 21: what enters the accounting does not depend on the private images


def plan_is_public(folder: Path) -> bool:
    """The same declared size and another number of images: the same plan to the last bit."""
    plans = [
        run(folder, units=units, size=60, ledger=f"{units}.db", work=f"w{units}", prepare_only=True)[0].plan
        for units in (60, 40)
    ]
    return plans[0] == plans[1]


def test_the_plan_is_public(tmp_path: Path):
    assert plan_is_public(tmp_path)


def test_a_plan_from_the_true_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, seen = module.make_plan, []
    opened = ProtectedImages.__init__

    def init(self: Any, *given: Any, **more: Any) -> None:
        opened(self, *given, **more)
        seen.append(len(self._units))

    monkeypatch.setattr(ProtectedImages, "__init__", init)
    monkeypatch.setattr(module, "make_plan", lambda **more: real(**{**more, "units": seen[-1]}))
    assert not plan_is_public(tmp_path)


# --- rule 12: the user's seed reaches nothing that is private


def differs_between_runs(folder: Path) -> list[bool]:
    """Whether the histogram, the mean images and the weights of two runs with one seed differ."""
    answers = []
    for name in "ab":
        model, _ = run(folder, size=60, ledger=f"{name}.db", work=name)
        assert model.noisy_histogram is not None and model.means is not None and model.generator is not None
        weight = next(iter(model.generator.network.parameters())).detach().numpy()
        answers.append((model.noisy_histogram, model.means, weight))
    return [bool((first != again).any()) for first, again in zip(*answers, strict=True)]


def test_the_seed_rules_nothing_private(tmp_path: Path):
    assert differs_between_runs(tmp_path) == [True, True, True]


def test_noise_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The published bug: `manual_seed` before the noise. Trained in another process's company, the query's classifier
    may round otherwise and move a vote, so a few tries are allowed."""

    def seeded(values: np.ndarray, scale: float) -> np.ndarray:
        return values + np.rint(np.random.default_rng(0).normal(0, scale, values.shape)).astype(np.int64)

    monkeypatch.setattr(mechanisms, "discrete_gaussian", seeded)
    monkeypatch.setattr(
        SecureStream, "gaussian", lambda self, shape: np.random.default_rng(0).standard_normal(shape)
    )
    for attempt in range(3):
        (tmp_path / str(attempt)).mkdir()
        if differs_between_runs(tmp_path / str(attempt))[:2] == [False, False]:
            return
    pytest.fail("seeded noise was not noticed")


# --- rule 15: what one account paid for is not certified, or gone on from, under another


def another_account(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, size=60, ledger="b.db")


def an_account_in_which_the_run_is_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "work" / "run.json").unlink()
    run(folder, size=60, ledger="a.db", total=Budget(100, 1e-3))


def an_older_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger from before the last step."""
    from sfumato.privacy.ledger import Reservation

    real = Reservation.begun
    monkeypatch.setattr(
        Reservation,
        "begun",
        lambda self, name: min(real(self, name), 1) if name == "dp_sgd" else real(self, name),
    )
    run(folder, size=60, ledger="a.db", total=Budget(100, 1e-3))


def a_smaller_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, size=60, ledger="a.db", total=Budget(100, 1e-3), budget=Budget(1, 1e-5))


@pytest.mark.parametrize(
    "resume", [another_account, an_account_in_which_the_run_is_unknown, an_older_copy, a_smaller_budget]
)
def test_a_run_goes_on_only_under_what_paid_for_it(
    resume: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, account = run(tmp_path, size=60, ledger="a.db", total=Budget(100, 1e-3))
    claim = certified(model, account)
    again, account = run(tmp_path, size=60, ledger="a.db", total=Budget(100, 1e-3))
    assert certified(again, account) == claim
    with pytest.raises((LedgerError, InputError)):
        resume(tmp_path, monkeypatch)
