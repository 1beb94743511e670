"""Tells means over samples from sums, of values that may be random.

A value was w[i] on a batch and f[i], s[i] on its halves, in rounds i that draw
random numbers (dropout, noise) of their own. With h = (f + s) / 2 a mean has
w = 1 h, a sum w = 2 h, but for noise. Noise has a square, so it would be taken
for a difference; but the noise of two rounds has no product:

    |E[w - c h]|^2  =  the mean of (w[i] - c h[i]) (w[j] - c h[j]), i != j

Rounds that are left out one by one (the jackknife) tell how exact that is.
"""

from dataclasses import replace

import numpy as np

from keras_allreduce.one_device.reduction import (
    COMPARES,
    MEAN,
    SUM,
    UNDECIDED,
    WEIGHTED,
    Reduction,
)

# Relative differences that are rounding: products in TF32 keep 3 digits, half
# precision 2.
EXACT = 1e-4
TF32 = 2e-3
HALF_PRECISION = 5e-2
# A step adds a small part to a variable: relative to that part, rounding of the
# whole is larger, up to the second.
LOST_IN_STATE = 1e-5
OF_STATE = 2e-2

# A difference counts if it is larger than so many of its standard deviations.
_DEVIATIONS = 4.0

# A mean or a sum is known up to so much of it, else it may compare samples.
_PRECISION = 0.25

_FACTORS = {MEAN: 1.0, SUM: 2.0}


def judged(
    whole: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    tolerance: float = EXACT,
) -> Reduction | None:
    """The reduction of a value.

    Args:
        whole: `whole[round, element]`, on the batch. Nothing is random if all
            rounds are equal; two may be by chance.
        first: `first[round, element]`, on its first half.
        second: Likewise on its second half.
        tolerance: Relative difference that is rounding.

    Returns:
        The reduction, `"undecided"` if it takes more rounds to tell; `None` if
        all is 0 or not finite, which tells nothing.
    """
    halves = (first.astype("f8") + second.astype("f8")) / 2
    whole = whole.astype("f8")
    if not np.isfinite(whole).all() or not np.isfinite(halves).all():
        return None
    if not whole.any() and not halves.any():
        return None
    if (whole == whole[0]).all() and (halves == halves[0]).all():
        whole, halves = whole[:1], halves[:1]  # Nothing is random.
    size = max(_square(whole)[0], _square(halves)[0])
    product, norm = _product(whole, halves), _square(halves)[0]
    ratio = product / norm if norm > 0 else 0.0
    nearest = SUM if ratio > np.sqrt(2) else MEAN
    left, _ = _square(whole - ratio * halves)
    residual = float(np.sqrt(max(left, 0.0) / size)) if size > 0 else 0.0
    found = Reduction(nearest, ratio=float(ratio), residual=residual)
    if size <= 0:
        return replace(found, doubt=UNDECIDED)
    possible = []
    is_precise = True
    for kind, factor in _FACTORS.items():
        gap, deviation = _square(whole - factor * halves)
        largest = _DEVIATIONS * deviation
        if gap <= tolerance**2 * size + largest:
            possible.append(kind)
            is_precise = gap + largest <= max(tolerance, _PRECISION) ** 2 * size
    if len(possible) == 1 and is_precise:
        return replace(found, kind=possible[0])
    if possible:
        return replace(found, doubt=UNDECIDED)
    if len(whole) == 1 and _is_weighted(whole[0], first[0], second[0]):
        return replace(found, doubt=WEIGHTED)
    return replace(found, doubt=COMPARES)


def _product(one: np.ndarray, other: np.ndarray) -> float:
    """An estimate of E[one] E[other], from rounds that differ."""
    gram = one @ other.T
    rounds = len(gram)
    if rounds == 1:
        return float(gram[0, 0])
    return float((gram.sum() - gram.trace()) / (rounds * (rounds - 1)))


def _square(value: np.ndarray) -> tuple[float, float]:
    """An estimate of |E[value]|^2, and its standard deviation."""
    gram = value @ value.T
    rounds = len(gram)
    if rounds == 1:
        return float(gram[0, 0]), 0.0
    pairs = gram.sum() - gram.trace()
    of_round = gram.sum(axis=1) - gram.diagonal()
    estimate = float(pairs / (rounds * (rounds - 1)))
    if rounds == 2:
        return estimate, abs(estimate)
    without = (pairs - 2 * of_round) / ((rounds - 1) * (rounds - 2))
    spread = np.sum((without - without.mean()) ** 2) * (rounds - 1) / rounds
    return estimate, float(np.sqrt(spread))


def _is_weighted(
    whole: np.ndarray, first: np.ndarray, second: np.ndarray
) -> bool:
    """Whether the halves count differently: whole = a first + b second."""
    if len(whole) < 3:
        return False
    halves = np.stack([first, second], axis=1).astype("f8")
    weights, *_ = np.linalg.lstsq(halves, whole, rcond=None)
    left = np.linalg.norm(whole - halves @ weights)
    return bool(
        left <= 1e-3 * np.linalg.norm(whole)
        and abs(weights.sum() - 1) < 1e-2
        and abs(weights[0] - weights[1]) > 1e-2
    )
