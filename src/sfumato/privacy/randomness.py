"""Random numbers that carry a guarantee: a ChaCha20 stream keyed by the operating system, and exact noise.

There is no way to pass a seed, and none is ever stored: noise that can be drawn again is no noise.

**Floating-point stance.** Histograms and counts use OpenDP's exact discrete samplers: their guarantee holds
to the last bit. The vector noise of DP-SGD and of mean images is a continuous Gaussian computed in float64
from 53-bit uniforms (Box-Muller) and added to a float sum. This is the stance of every DP-SGD library; what
it leaves open is (a) the accounting treats the noise as real-valued, while the released floats lie on a grid,
an attack surface for somebody who sees the un-rounded sums (Mironov 2012), and (b) tails end at
sqrt(-2 ln 2^-53) = 8.57 standard deviations, where the true Gaussian has 1e-17 of its mass, far below any
delta used. Released values are rounded to float32 after the noise, which is post-processing.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from sfumato.errors import InputError

LATTICE = 1024  # steps of discrete Gaussian noise in one unit
_BLOCK = 1 << 16  # bytes of stream per call to the cipher; also what stays buffered at most
_ZEROS = bytes(_BLOCK)
_WORK = 1 << 15  # pairs of normals per round, small enough to stay in the processor's cache


class SecureStream:
    """A stream of cryptographically secure random numbers, keyed by `os.urandom`.

    Safe across `fork` (a child draws from a new key) and to share between threads.
    """

    def __init__(self) -> None:
        self._key()

    def __repr__(self) -> str:
        return "SecureStream()"

    def __reduce__(self) -> tuple[type[SecureStream], tuple[()]]:
        return SecureStream, ()  # a copy is a new stream: its state never leaves the process

    def uniform64(self, n: int) -> np.ndarray:
        """`n` independent uniform 64-bit integers, uint64 [n]."""
        return np.frombuffer(self._bytes(8 * n), dtype=np.uint64)

    def bernoulli(self, p: float, n: int) -> np.ndarray:
        """`n` independent coins, bool [n], true with probability floor(p 2^64) / 2^64: never above `p`."""
        if not 0 <= p <= 1:
            raise InputError(f"a probability must lie between 0 and 1, not {p}")
        numerator, denominator = float(p).as_integer_ratio()
        threshold = (numerator << 64) // denominator
        if threshold == 1 << 64:
            return np.ones(n, dtype=bool)
        high, low = divmod(
            threshold, 1 << 48
        )  # the first 16 bits decide nearly always; the other 48 where they do not
        first = np.frombuffer(self._bytes(2 * n), dtype=np.uint16)
        heads = first < high
        close = np.flatnonzero(first == high)
        heads[close] = self.uniform64(len(close)) >> np.uint64(16) < np.uint64(low)
        return heads

    def integers(self, below: int, n: int) -> np.ndarray:
        """`n` independent integers, int64 [n], exactly uniform on 0 .. below - 1 (by rejection)."""
        if not 1 <= below < 1 << 62:
            raise InputError(f"the upper end of random integers must be positive, not {below}")
        accepted = ((1 << 64) // below) * below
        out = np.empty(n, dtype=np.int64)
        filled = 0
        while filled < n:
            draws = self.uniform64(n - filled)
            if accepted < 1 << 64:
                draws = draws[draws < np.uint64(accepted)]
            out[filled : filled + len(draws)] = draws % np.uint64(below)
            filled += len(draws)
        return out

    def gaussian(self, shape: int | Sequence[int]) -> np.ndarray:
        """Independent standard normals, float64 of the given shape (Box-Muller; see above)."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n = math.prod(shape)
        out = np.empty(n + n % 2)
        for start in range(0, len(out), 2 * _WORK):
            pair = out[start : start + 2 * _WORK].reshape(2, -1)
            bits = self.uniform64(pair.size).reshape(pair.shape) >> np.uint64(11)
            pair[...] = bits
            radius, angle = pair[0] + 1.0, pair[1] * (2 * math.pi * 2.0**-53)
            radius *= 2.0**-53  # in (0, 1]: the logarithm is finite
            np.log(radius, out=radius)
            radius *= -2.0
            np.sqrt(radius, out=radius)
            np.cos(angle, out=pair[0])
            np.sin(angle, out=pair[1])
            pair *= radius
        return out[:n].reshape(shape)

    def seed(self) -> int:
        """A fresh 63-bit seed for another generator (torch, numpy). Never store or print it."""
        return int(self.uniform64(1)[0] >> np.uint64(1))

    def _key(self) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # ChaCha20 with a fresh 256-bit key. The 16 bytes are a 64-bit block counter and a 64-bit nonce, so
        # the stream does not repeat within 2^70 bytes; one key is never used twice.
        self._cipher = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._buffer = b""
        self._used = 0

    def _bytes(self, n: int) -> bytes:
        if self._owner != os.getpid():
            self._key()
        if n < 0:
            raise InputError("cannot draw a negative number of random values")
        with self._lock:
            if n > _BLOCK:
                return self._cipher.update(bytes(n))
            if self._used + n > len(self._buffer):
                self._buffer, self._used = self._cipher.update(_ZEROS), 0
            taken = self._buffer[self._used : self._used + n]
            self._used += n
        return taken


def discrete_gaussian(values: np.ndarray, scale: float) -> np.ndarray:
    """Adds exact discrete Gaussian noise to each integer (OpenDP; Canonne, Kamath and Steinke 2020).

    The noise lives on a lattice of 1/1024, and the sum is rounded to a whole number afterwards, which is
    post-processing. On the integers themselves the noise would cost up to 0.2 % more epsilon than the
    continuous Gaussian event of the same multiplier when the scale is small; on this lattice the two agree to
    within the accounting's own rounding (a test compares the two accountings).

    Args:
        values: Any shape, integer type.
        scale: Standard deviation parameter, positive and finite.

    Returns:
        int64 array of the same shape.
    """
    from opendp import prelude

    dp: Any = prelude
    values = _integers(values)
    _check_scale(scale)
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    fine = dp.m.make_gaussian(*space, scale=float(scale) * LATTICE)((values * LATTICE).ravel().tolist())
    return np.rint(np.array(fine, dtype=np.int64) / LATTICE).astype(np.int64).reshape(values.shape)


def discrete_laplace(value: int, scale: float) -> int:
    """Adds exact discrete Laplace noise, P(x) proportional to exp(-|x| / scale), to one integer (OpenDP).

    With sensitivity s this is (s / scale, 0)-differentially private.
    """
    from opendp import prelude

    dp: Any = prelude
    _check_scale(scale)
    dp.enable_features("contrib")
    space = dp.atom_domain(T="i64"), dp.absolute_distance(T="i64")
    return int(dp.m.make_laplace(*space, scale=float(scale))(int(value)))


def _integers(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"discrete noise needs whole numbers, not {values.dtype}; no budget was spent")
    return values.astype(np.int64)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"the scale of noise must be positive and finite, not {scale}; no budget was spent")
