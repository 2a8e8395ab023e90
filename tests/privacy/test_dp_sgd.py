"""The loop: charged before sampling, noise once, public divisor, resume without replay, several processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato.privacy.dp_sgd as module
from sfumato.checkpoint import WeightAverage
from sfumato.errors import InputError, LedgerError
from sfumato.privacy.dp_sgd import DPSGDPlan, DPSGDResult, dp_sgd, measure_step_seconds, random_rows

sys.path.insert(0, str(Path(__file__).parent))
from fakes import FakePrivate, FakeReservation, Net, make_rows, plain_rows, plan, reservation, row_loss

HERE = Path(__file__).parent


def run(net, private, chosen, held, rows=make_rows, **more):
    more.setdefault("optimizer", torch.optim.SGD(net.parameters(), lr=1.0))
    return dp_sgd(net, private, chosen, held, make_rows=rows, row_loss=row_loss, **more)


def weights(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_runs_on_a_real_ledger_and_spends_what_was_planned(tmp_path):
    chosen = plan()
    held, net = reservation(tmp_path, chosen), Net()
    before = weights(net).clone()
    average = WeightAverage(net, 0.9)
    rates = []
    result = run(
        net, FakePrivate(20, groups=True), chosen, held,
        optimizer=torch.optim.Adam(net.parameters(), lr=9.0), ema=average, checkpoint_dir=tmp_path,
        lr=lambda step: rates.append(step) or 1e-3,
    )  # fmt: skip
    assert result == DPSGDResult(6, 6) and held.begun("dp_sgd") == 6
    assert rates == list(range(6)) and average.updates == 6
    assert 0 < (weights(net) - before).abs().max() < 0.1
    assert run(net, FakePrivate(20), chosen, held, checkpoint_dir=tmp_path, optimizer=torch.optim.Adam(
        net.parameters(), lr=9.0)) == DPSGDResult(6, 6)  # fmt: skip
    assert held.begun("dp_sgd") == 6


def test_a_step_is_the_noised_sum_over_the_public_divisor(monkeypatch):
    """With the noise replaced by a known one and q = 1, the step can be computed by hand."""

    class Known(module.SecureStream):
        def gaussian(self, shape):
            return np.full(shape, 0.25)

    monkeypatch.setattr(module, "SecureStream", Known)
    chosen = plan(
        sampling_probability=1.0, steps=1, noise_multiplier=2.0, clip_norm=0.05, expected_batch=40.0
    )
    private, net = FakePrivate(7), Net()
    by_hand = Net()
    images = torch.from_numpy(private._images).permute(0, 3, 1, 2).float() / 127.5 - 1
    total = torch.zeros_like(weights(net))
    for unit in range(7):
        rows = plain_rows(images[unit : unit + 1], torch.from_numpy(private._labels[unit : unit + 1]), None)
        gradient = torch.autograd.grad(row_loss(by_hand, rows).mean(), list(by_hand.parameters()))
        gradient = torch.cat([g.flatten() for g in gradient])
        total += gradient * min(1.0, 0.05 / gradient.norm())
    expected = weights(by_hand) - (total + 2.0 * 0.05 * 0.25) / 40.0
    run(net, private, chosen, FakeReservation(), plain_rows)
    assert torch.allclose(weights(net), expected, atol=2e-6)


@pytest.mark.parametrize("units", [0, 3])
def test_empty_batches_take_a_noisy_step(units):
    chosen = plan(sampling_probability=1e-12, steps=3, clip_norm=1.0)
    net, held = Net(), FakeReservation()
    before = weights(net).clone()
    assert run(net, FakePrivate(units), chosen, held) == DPSGDResult(3, 3)
    assert held.begun("dp_sgd") == 3
    assert (weights(net) != before).all()


def test_physical_batch_changes_nothing_but_rounding(monkeypatch):
    class Known(module.SecureStream):
        def gaussian(self, shape):
            return np.zeros(shape)

    monkeypatch.setattr(module, "SecureStream", Known)
    chosen = plan(sampling_probability=1.0, steps=3)
    found = []
    for physical_batch, pixels in ((None, 16_000_000), (1, 16_000_000), (3, 100)):
        monkeypatch.setattr(module, "PIXELS_AT_ONCE", pixels)
        net = Net()
        run(net, FakePrivate(10), chosen, FakeReservation(), plain_rows, physical_batch=physical_batch)
        found.append(weights(net))
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[0], found[2], atol=1e-6)


def test_nothing_of_the_data_is_shown(capfd):
    run(Net(), FakePrivate(37), plan(), FakeReservation())
    shown = capfd.readouterr()
    words = (shown.out + shown.err).lower()
    assert "6/6 steps" in words
    assert all(word not in words for word in ("loss", "norm", "batch", "37"))


class Stop(Exception):
    pass


def test_resume_goes_on_and_never_replays(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    chosen = plan()
    held, net = reservation(tmp_path, chosen), Net()
    seeds = []

    def crash_on_the_fourth(images, labels, generator):
        seeds.append(generator.initial_seed())
        if held.begun("dp_sgd") == 4:
            raise Stop
        return make_rows(images, labels, generator)

    with pytest.raises(Stop):
        run(net, FakePrivate(20), chosen, held, crash_on_the_fourth, checkpoint_dir=tmp_path)
    assert held.begun("dp_sgd") == 4  # spent although never applied
    after_three = weights(net).clone()
    other = Net()
    steps = []
    result = run(
        other,
        FakePrivate(20),
        chosen,
        held,
        checkpoint_dir=tmp_path,
        lr=lambda step: steps.append(step) or 0.0,
    )
    assert torch.equal(weights(other), after_three)  # started from the checkpoint; rate 0 from there
    assert result == DPSGDResult(6, 5) and steps == [4, 5] and held.begun("dp_sgd") == 6
    assert len(set(seeds)) == len(seeds)


def test_interrupt_leaves_a_checkpoint_and_is_passed_on(tmp_path):
    chosen, held, net = plan(), FakeReservation(), Net()

    def interrupt(images, labels, generator):
        if held.begun("dp_sgd") == 3:
            raise KeyboardInterrupt
        return make_rows(images, labels, generator)

    with pytest.raises(KeyboardInterrupt):
        run(net, FakePrivate(50), chosen, held, interrupt, checkpoint_dir=tmp_path)
    assert run(Net(), FakePrivate(50), chosen, held, checkpoint_dir=tmp_path) == DPSGDResult(6, 5)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    chosen, held = plan(steps=1), FakeReservation()
    run(Net(), FakePrivate(5), chosen, held, checkpoint_dir=tmp_path)
    other = FakeReservation()
    other.id = "another"
    with pytest.raises(InputError, match="another run"):
        run(Net(), FakePrivate(5), chosen, other, checkpoint_dir=tmp_path)
    (tmp_path / module.CHECKPOINT).write_bytes(b"garbage")
    with pytest.raises(InputError, match="no budget was spent"):
        run(Net(), FakePrivate(5), chosen, FakeReservation(), checkpoint_dir=tmp_path)
    assert other.log == []


def test_a_ledger_put_back_is_noticed(tmp_path):
    """A checkpoint with more steps than the ledger has charged: going on would be free of charge."""

    class PutBack:
        def __init__(self, held, begun) -> None:
            self.id, self.begin, self._begun = held.id, held.begin, begun

        def begun(self, mechanism) -> int:
            return self._begun

    chosen = plan()
    held, net = reservation(tmp_path, chosen), Net()
    run(net, FakePrivate(20), chosen, held, checkpoint_dir=tmp_path)
    with pytest.raises(LedgerError, match="older copy"):
        run(Net(), FakePrivate(20), chosen, PutBack(held, 3), checkpoint_dir=tmp_path)


def test_row_randomness_cannot_be_guessed_from_32_bits(monkeypatch):
    """torch uses 32 bits of a CPU generator's seed; 2^32 tries would make the row randomness public."""
    stream = module.SecureStream()
    seeds = iter([7, 7 + 2**32, 7, 1])
    monkeypatch.setattr(module.SecureStream, "seed", lambda self: next(seeds))
    drawn = [torch.randn(4, generator=module.secret_generator(stream, torch.device("cpu"))) for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    many = torch.randn(200_000, generator=module.secret_generator(stream, torch.device("cpu")))
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02


def test_the_engine_is_checked_with_as_many_rows_as_are_used(monkeypatch, tmp_path):
    """Engines choose another way of computing by the number of rows in a unit."""
    seen = []
    monkeypatch.setattr(module, "selfcheck", lambda net, loss, rows, engine: seen.append(rows["x"].shape[1]))
    chosen = plan(rows_per_unit=9)
    run(Net(), FakePrivate(4), chosen, reservation(tmp_path, chosen))
    assert seen == [9]


def test_an_unsound_network_stops_before_anything_is_spent():
    net, held = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Conv2d(1, 1, 4)), FakeReservation()

    def loss(call, rows):
        return call(rows["x"])[:, 0, 0, 0]

    with pytest.raises(InputError, match="no budget was spent"):
        dp_sgd(net, FakePrivate(5), plan(), held, make_rows=make_rows, row_loss=loss,
               optimizer=torch.optim.SGD(net.parameters(), lr=1.0))  # fmt: skip
    assert held.log == []


def test_plans_are_checked_and_describe_themselves():
    for name in DPSGDPlan.__dataclass_fields__:
        for bad in (0, -1, float("nan")):
            with pytest.raises(InputError, match=name):
                plan(**{name: bad})
    with pytest.raises(InputError, match="sampling_probability"):
        plan(sampling_probability=1.5)
    planned = plan(clip_norm=1e-3).planned("fine-tuning")
    assert planned.count == 6 and planned.mechanism == "dp_sgd" and "clip norm 0.001" in planned.says
    assert planned.event.sampling_probability == 0.5 and planned.event.event.noise_multiplier == 1.0


def test_step_time_is_measured_on_random_rows():
    net = Net()
    before = weights(net).clone()
    rows = random_rows((4, 4), 1, 3, 2, 2, make_rows, "cpu")
    assert 0 < measure_step_seconds(net, row_loss, rows, units=5) < 60
    assert torch.equal(weights(net), before)


KILLED = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
import torch, sfumato.privacy.dp_sgd as module
from fakes import *
module.SECONDS_BETWEEN_CHECKPOINTS = -1.0
folder = Path({folder!r})
chosen = plan(steps=100000); net = Net()
print("started", flush=True)
module.dp_sgd(net, FakePrivate(20), chosen, reservation(folder, chosen), make_rows=make_rows,
    row_loss=row_loss, optimizer=torch.optim.Adam(net.parameters()), checkpoint_dir=folder)
"""


def test_a_killed_run_stays_spent_and_resumes(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED.format(here=str(HERE), folder=str(tmp_path))])
    checkpoint = tmp_path / module.CHECKPOINT
    end = time.monotonic() + 60
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    chosen = plan(steps=100000)
    held = reservation(tmp_path, chosen)
    begun = held.begun("dp_sgd")
    assert begun >= 1
    net, optimizer = Net(), None
    optimizer = torch.optim.Adam(net.parameters())
    applied = module.load_checkpoint(checkpoint, net, optimizer, None, owner=held.id)["steps_applied"]
    assert 1 <= applied <= begun and begun - applied <= 1
