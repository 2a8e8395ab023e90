"""Noise has the distribution it should have, never repeats, and takes no seed.

Tolerances are set for a chance of a false alarm well below 1e-6 a test.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from sfumato.errors import InputError
from sfumato.privacy import randomness
from sfumato.privacy.randomness import LATTICE, SecureStream, discrete_gaussian, discrete_laplace

ALARM = 1e-9


def test_gaussian_is_standard_normal():
    sample = SecureStream().gaussian(1_000_001)
    assert sample.dtype == np.float64
    assert kstest(sample, "norm").pvalue > ALARM
    n = len(sample)
    assert abs(sample.mean()) < 7 / math.sqrt(n)
    assert abs(sample.var() - 1) < 7 * math.sqrt(2 / n)
    assert abs(np.mean(sample[1:] * sample[:-1])) < 7 / math.sqrt(n)
    half = n // 2
    assert abs(np.mean(sample[:half] * sample[half : 2 * half])) < 7 / math.sqrt(half)


def test_both_halves_of_a_box_muller_pair_are_normal_and_independent():
    pairs = SecureStream().gaussian((16, 2, randomness._WORK)).reshape(16, 2, -1)
    first, second = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    assert kstest(first, "norm").pvalue > ALARM
    assert kstest(second, "norm").pvalue > ALARM
    assert abs(np.mean(first * second)) < 7 / math.sqrt(len(first))
    assert abs(np.mean(first**2 * second**2) - 1) < 7 * math.sqrt(8 / len(first))


@pytest.mark.parametrize("bits", [0, 1, 2**64 - 1])
def test_extreme_bits_give_finite_normals(monkeypatch, bits):
    monkeypatch.setattr(SecureStream, "uniform64", lambda self, n: np.full(n, bits, dtype=np.uint64))
    assert np.isfinite(SecureStream().gaussian(10)).all()


@pytest.mark.parametrize("shape", [0, 1, 7, (0, 3), (2, 5), (3, 1, 4), [2, 2], ()])
def test_gaussian_shapes(shape):
    expected = (shape,) if isinstance(shape, int) else tuple(shape)
    assert SecureStream().gaussian(shape).shape == expected


def test_ten_million_normals_a_second_give_or_take_a_busy_machine():
    stream, rates = SecureStream(), []
    for _ in range(3):
        start = time.process_time()
        stream.gaussian(2_000_000)
        rates.append(2_000_000 / (time.process_time() - start))
    assert max(rates) > 4e6


def test_bits_are_balanced_and_every_size_of_request_works():
    stream = SecureStream()
    words = np.concatenate([stream.uniform64(n) for n in (0, 1, 5, 8191, 8192, 8193, 100_000)])
    assert len(words) == 124_582
    ones = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 7 * 0.5 / math.sqrt(len(words))
    assert len(np.unique(words)) == len(words)


def test_integers_are_uniform():
    for below in (1, 3, 10, 1000):
        draws = SecureStream().integers(below, 100_000)
        assert draws.min() >= 0 and draws.max() < below
        if below > 1:
            assert chisquare(np.bincount(draws, minlength=below)).pvalue > ALARM
    with pytest.raises(InputError):
        SecureStream().integers(0, 1)


def test_integers_reject_the_uneven_end(monkeypatch):
    words = iter([np.array([2**64 - 1, 5], dtype=np.uint64), np.array([4], dtype=np.uint64)])
    monkeypatch.setattr(SecureStream, "uniform64", lambda self, n: next(words))
    assert SecureStream().integers(3, 2).tolist() == [2, 1]  # 2^64 - 1 = 3 * k is above the last full block


@settings(max_examples=200)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**64 - 1))
def test_the_true_rate_is_never_above_the_accounted_one(p, word):
    """A coin falls on true for exactly floor(p 2^64) of the 2^64 words that its 16 and 48 bits make."""
    numerator, denominator = p.as_integer_ratio()
    threshold = (numerator << 64) // denominator
    words = [w for w in (word, 0, threshold - 1, threshold, threshold + 1, 2**64 - 1) if 0 <= w < 2**64]
    close = [(w % 2**48) << 16 for w in words if w >> 48 == threshold >> 48]
    stream = SecureStream()
    stream._bytes = lambda n: np.array([w >> 48 for w in words], np.uint16).tobytes()  # type: ignore[method-assign]
    stream.uniform64 = lambda n: np.array(close, np.uint64)[:n]  # type: ignore[method-assign]
    assert stream.bernoulli(p, len(words)).tolist() == [w < threshold for w in words]


def test_bernoulli_rate_and_edges():
    stream, n = SecureStream(), 400_000
    for p in (0.001, 1 / 3, 0.9):
        assert abs(stream.bernoulli(p, n).mean() - p) < 7 * math.sqrt(p * (1 - p) / n)
    assert not stream.bernoulli(0.0, 1000).any() and stream.bernoulli(1.0, 1000).all()
    assert stream.bernoulli(0.5, 0).shape == (0,)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError):
            stream.bernoulli(p, 1)


def test_streams_never_repeat_each_other():
    streams = [SecureStream() for _ in range(4)]
    streams += [copy.copy(streams[0]), copy.deepcopy(streams[0])]
    words = np.concatenate([stream.uniform64(1000) for stream in streams])
    assert len(np.unique(words)) == len(words)
    assert len({stream.seed() for stream in streams}) == len(streams)


def test_a_forked_child_draws_something_else():
    stream = SecureStream()
    stream.uniform64(1)  # both processes hold the same buffer now
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, stream.uniform64(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 32), dtype=np.uint64)
    os.close(read), os.close(write)
    assert not np.isin(theirs, stream.uniform64(16_000)).any()


def test_there_is_no_way_to_pass_a_seed():
    for thing in (
        SecureStream,
        SecureStream.gaussian,
        SecureStream.seed,
        discrete_gaussian,
        discrete_laplace,
    ):
        names = set(inspect.signature(thing).parameters)
        assert not names & {"seed", "key", "rng", "generator", "random_state"}
    assert 0 <= SecureStream().seed() < 2**63
    assert "0x" not in repr(SecureStream())


def discrete_gaussian_pmf(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the noise on the lattice, rounded to whole numbers (half to even)."""
    fine = np.arange(-int(12 * scale + 12) * LATTICE, int(12 * scale + 12) * LATTICE + 1)
    mass = np.exp(-((fine / LATTICE) ** 2) / (2 * scale**2))
    whole = np.rint(fine / LATTICE).astype(int)
    return np.arange(whole[0], whole[-1] + 1), np.bincount(whole - whole[0], mass / mass.sum())


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Chi-square with the tails pooled until every cell expects at least 50."""
    order = np.argsort(-expected)
    enough = order[expected[order] >= 50]
    pooled = np.append(counts[enough], counts.sum() - counts[enough].sum())
    wanted = np.append(expected[enough], expected.sum() - expected[enough].sum())
    keep = wanted > 5
    return chisquare(pooled[keep], wanted[keep] * pooled[keep].sum() / wanted[keep].sum()).pvalue > ALARM


def test_discrete_gaussian_has_its_distribution():
    values = np.full((10, 2000), 1000)
    noisy = discrete_gaussian(values, 3.3)
    assert noisy.shape == values.shape and noisy.dtype == np.int64
    support, mass = discrete_gaussian_pmf(3.3)
    counts = np.array([(noisy - 1000 == s).sum() for s in support])
    assert counts.sum() == noisy.size
    assert fits(counts, mass * noisy.size)


def test_discrete_laplace_has_its_distribution():
    epsilon, n = 0.5, 5000
    noise = np.array([discrete_laplace(7, 1 / epsilon) - 7 for _ in range(n)])
    support = np.arange(-80, 81)
    mass = np.exp(-epsilon * np.abs(support)) * math.tanh(epsilon / 2)
    assert fits(np.array([(noise == s).sum() for s in support]), mass * n)


def test_discrete_noise_on_a_large_histogram_is_quick():
    start = time.process_time()
    discrete_gaussian(np.zeros((10, 1000), dtype=np.int64), 50 * math.sqrt(5))
    assert time.process_time() - start < 4


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_noise_without_meaning_is_refused(scale):
    with pytest.raises(InputError, match="no budget was spent"):
        discrete_gaussian(np.zeros(3, dtype=np.int64), scale)
    with pytest.raises(InputError, match="no budget was spent"):
        discrete_laplace(1, scale)


def test_discrete_noise_wants_whole_numbers():
    with pytest.raises(InputError):
        discrete_gaussian(np.zeros(3), 1.0)
    assert discrete_gaussian(np.zeros((0, 4), dtype=np.int64), 1.0).shape == (0, 4)
