"""Poisson sampling over units, and the event that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sfumato.errors import InputError
from sfumato.privacy.randomness import SecureStream

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


class PoissonSampler:
    """Each unit enters each batch on its own, with the same probability, whoever else does.

    The batch size varies, from 0 to all units; both are batches like any other and get noise and a step. A
    fixed batch size, or shuffling, is another mechanism with a larger epsilon than the one accounted here.

    Args:
        num_units: Private; never printed.
        probability: Public, fixed in advance.
        stream: The secure stream to draw from.
    """

    def __init__(self, num_units: int, probability: float, stream: SecureStream) -> None:
        if not 0 <= probability <= 1:
            raise InputError(f"the sampling probability must lie between 0 and 1, not {probability}")
        if num_units < 0:
            raise InputError("the number of units cannot be negative")
        self.probability = float(probability)
        self._num_units, self._stream = num_units, stream

    def __repr__(self) -> str:
        return f"PoissonSampler(probability={self.probability})"

    def sample(self) -> np.ndarray:
        """A fresh batch: sorted unit numbers, int64, each at most once, possibly none."""
        return np.flatnonzero(self._stream.bernoulli(self.probability, self._num_units)).astype(np.int64)

    def event(self, noise_multiplier: float) -> DpEvent:
        """What one batch costs whose clipped sum gets Gaussian noise of `noise_multiplier` x clip norm."""
        from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

        return PoissonSampledDpEvent(self.probability, GaussianDpEvent(float(noise_multiplier)))
