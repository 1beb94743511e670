"""Tells means over the samples of a batch from sums, by measurement.

What a custom step differentiates does not say whether it is a mean or a sum.
But its gradients do. With g(B) on a batch B of two halves B1 and B2, and
m = (g(B1) + g(B2)) / 2:

    a mean over samples                       g(B) = 1 m
    a sum over samples, a mean over another
    constant number of samples                g(B) = 2 m
    a loss that compares samples              neither

The gradients may be random (dropout, noise); then the mean of several rounds
is taken, and their spread tells how exact it is.
"""

from dataclasses import dataclass

import numpy as np

MEAN = "mean"
SUM = "sum"

# Beyond what is rounded: products in TF32 keep 3 digits, half precision 2.
EXACT = 1e-4
TF32 = 2e-3
HALF_PRECISION = 5e-2
# What a step adds to a variable is a small part of it.
STATE = 2e-2


@dataclass(frozen=True)
class Nature:
    """How a value of a batch follows from those of its parts.

    Attributes:
        kind: `"mean"` or `"sum"`: which of them is nearer.
        is_exact: Whether it is one up to rounding and randomness.
        ratio: g(B) / m, by least squares; 1 for a mean, 2 for a sum.
        residual: What is left of g(B) then, relative to it.
    """

    kind: str = MEAN
    is_exact: bool = True
    ratio: float = 1.0
    residual: float = 0.0


def measured(
    whole: np.ndarray, halves: np.ndarray, tolerance: float = EXACT
) -> Nature:
    """The nature of a value from what it was on a batch and on its halves.

    Args:
        whole: `whole[round, element]`, on the batch.
        halves: `halves[round, element]`, the mean of those on its halves.
        tolerance: Relative difference that is rounding.

    Returns:
        The nature; an exact mean if all is 0 or not finite, which tells
        nothing.
    """
    rounds = len(whole)
    whole, halves = whole.astype("f8"), halves.astype("f8")
    one, other = halves.mean(axis=0), whole.mean(axis=0)
    size = float(other @ other)
    if not np.isfinite(size) or not np.isfinite(one).all() or size == 0:
        return Nature()
    norm = float(one @ one)
    ratio = float(one @ other) / norm if norm else 0.0
    residual = np.sqrt(float(np.sum((other - ratio * one) ** 2)) / size)
    kind = SUM if ratio > np.sqrt(2) else MEAN
    expected = 2.0 if kind == SUM else 1.0
    # The spread of whole - expected * halves over the rounds, which is 0 where
    # nothing is random.
    gaps = whole - expected * halves
    spread = np.sqrt(np.sum(gaps.var(axis=0)) / max(rounds - 1, 1) / size)
    allowed = tolerance + 4 * float(spread)
    off = np.sqrt(float(np.sum((other - expected * one) ** 2)) / size)
    return Nature(kind, bool(off <= allowed), ratio, float(residual))
