"""What a number of seeds can show, before anything is trained.

detectable_difference(8, 0.007, tests=6)      # of accuracies whose paired differences have this standard deviation
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from erpe.errors import ConfigError

_QUANTILES = (np.arange(4096) + 0.5) / 4096
"""Middles of equal parts of (0, 1)."""


def power_of(difference: float, n: int, sd: float, tests: int = 1, alpha: float = 0.05) -> float:
    """Chance that the two-sided paired t-test of n pairs finds a true difference, as the first of a Holm family.

    With noncentrality d sqrt(n) / sd and n - 1 degrees of freedom, at the level alpha / tests.

    Args:
        difference: the true one, in the unit of `sd`.
        n: pairs, 2 or more.
        sd: standard deviation of the paired differences.
        tests: of the family.
    """
    level, shift = alpha / tests, abs(difference) * math.sqrt(n) / sd
    bound = stats.t.isf(level / 2, n - 1)
    # Noncentral t is a normal variable over s, the root of chi-squared / df. The mean over quantiles of s is sound for
    # two pairs and many tests too, where the series of `scipy.stats.nct` gives NaN.
    s = np.sqrt(stats.chi2.ppf(_QUANTILES, n - 1) / (n - 1))  # (quantiles,)
    return float(np.mean(stats.norm.cdf(shift - bound * s) + stats.norm.cdf(-shift - bound * s)))


def detectable_difference(n: int, sd: float, tests: int = 1, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest true difference that n pairs find with this power; infinite for fewer than two pairs.

    Args:
        n: seeds that both arms have.
        sd: standard deviation of the paired differences; the answer is in its unit.
        tests: of the family that Holm corrects; the answer is for the first of them.
    Raises:
        ConfigError: numbers that make no sense.
    """
    _check(sd, tests, power, alpha)
    if n < 2:
        return math.inf
    high = 1.0
    while power_of(high, n, 1.0, tests, alpha) < power:
        high *= 2
    return sd * float(brentq(lambda d: power_of(d, n, 1.0, tests, alpha) - power, 0, high, xtol=1e-9))


def _check(sd: float, tests: int, power: float, alpha: float) -> None:
    if not (0 < sd < math.inf):
        raise ConfigError(f"standard deviation: {sd:g} given; use a number above 0 instead")
    if tests < 1:
        raise ConfigError(f"tests: {tests} given; use 1 or more instead")
    if not alpha < power < 1:
        raise ConfigError(f"power: {power:g} given; use a number above {alpha:g} and below 1 instead")
