"""Two parts of a data set, each with its share of every class.

Place by place what scikit-learn's `train_test_split` gives: importing that takes a second of every worker's start.
"""

from __future__ import annotations

import math

import numpy as np


def stratified(labels: np.ndarray, second: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first and of the second part, each in ascending order.

    Args:
        labels: (n,) the class of each place.
        second: size of the second part: how many, or which part of all, rounded up.
    """
    rng = np.random.RandomState(seed)
    classes, counts = np.unique(labels, return_counts=True)
    size = math.ceil(second * len(labels)) if isinstance(second, float) else second
    first = _shares(counts, len(labels) - size, rng)
    _shares(counts - first, size, rng)  # draws as scikit-learn does; what is left is the second part
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for number, count in zip(classes, first, strict=True):
        shuffled = rng.permutation(np.flatnonzero(labels == number))
        parts[0].append(shuffled[:count])
        parts[1].append(shuffled[count:])
    return np.sort(np.concatenate(parts[0])), np.sort(np.concatenate(parts[1]))


def _shares(counts: np.ndarray, size: int, rng: np.random.RandomState) -> np.ndarray:
    """How many of each class, (classes,): rounded down, then one more where most is missing; lots decide a tie."""
    exact = counts / counts.sum() * size
    shares = np.floor(exact)
    missing = int(size - shares.sum())
    for rest in np.unique(exact - shares)[::-1]:
        if missing == 0:
            break
        tied = np.flatnonzero(exact - np.floor(exact) == rest)
        tied = rng.choice(tied, size=min(len(tied), missing), replace=False)
        shares[tied] += 1
        missing -= len(tied)
    return shares.astype(int)
