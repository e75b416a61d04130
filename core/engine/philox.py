"""Random numbers made on the host from (seed, position), so that a request's do not depend on what runs beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10: four random 32-bit words from counter [4, n] and key [2, n], all held as uint64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; tested against Random123's vectors.
    """
    rounds = np.arange(10, dtype=np.uint64)[:, None, None]
    even, odd = counter[::2], counter[1::2]
    for round_key in (key + rounds * _WEYL) & _LOW:
        product = even * _MULTIPLIERS
        even, odd = (product >> _HALF)[::-1] ^ odd ^ round_key, (product & _LOW)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One uniform number in [0, 1) for each seed and position [n], in units of 2**-31."""
    counter = np.zeros((4, len(positions)), np.uint64)
    counter[0] = positions  # below 2**32
    units: NDArray[np.int64] = philox(counter, np.stack((seeds & _LOW, seeds >> _HALF)))[0].astype(np.int64) >> 1
    return units
