"""Batches are drawn as they are accounted for: every unit by itself, afresh each time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from sfumato.errors import InputError
from sfumato.privacy.randomness import SecureStream
from sfumato.privacy.sampling import PoissonSampler


def test_inclusion_rates_sizes_and_pairs():
    n, q, rounds = 40, 0.3, 20_000
    sampler = PoissonSampler(n, q, SecureStream())
    member = np.zeros((rounds, n), dtype=bool)
    for row in member:
        row[sampler.sample()] = True
    assert np.abs(member.mean(axis=0) - q).max() < 7 * math.sqrt(q * (1 - q) / rounds)
    together = member[:, :-1] & member[:, 1:]
    assert np.abs(together.mean(axis=0) - q**2).max() < 7 * math.sqrt(q**2 / rounds)
    again = member[:-1] & member[1:]  # membership does not depend on the batch before
    assert np.abs(again.mean(axis=0) - q**2).max() < 8 * math.sqrt(q**2 / rounds)
    sizes = np.bincount(member.sum(axis=1), minlength=n + 1)[3:23]
    expected = binom.pmf(np.arange(3, 23), n, q)
    assert chisquare(sizes, expected / expected.sum() * sizes.sum()).pvalue > 1e-9


def test_most_batches_are_empty_when_q_is_small():
    sampler = PoissonSampler(10, 0.01, SecureStream())
    sizes = [len(sampler.sample()) for _ in range(500)]
    assert 400 < sizes.count(0) < 500


@given(st.integers(0, 200), st.floats(0, 1))
def test_a_batch_holds_units_at_most_once(n, q):
    batch = PoissonSampler(n, q, SecureStream()).sample()
    assert batch.dtype == np.int64
    assert len(np.unique(batch)) == len(batch)
    assert batch.size == 0 or (batch.min() >= 0 and batch.max() < n)


def test_edges():
    assert PoissonSampler(0, 0.5, SecureStream()).sample().size == 0
    assert PoissonSampler(5, 0.0, SecureStream()).sample().size == 0
    assert PoissonSampler(5, 1.0, SecureStream()).sample().tolist() == [0, 1, 2, 3, 4]
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError):
            PoissonSampler(5, q, SecureStream())


def test_the_sampler_emits_its_own_event_and_hides_the_number_of_units():
    sampler = PoissonSampler(1234, 0.25, SecureStream())
    assert sampler.event(2.5) == PoissonSampledDpEvent(0.25, GaussianDpEvent(2.5))
    assert "1234" not in repr(sampler)
