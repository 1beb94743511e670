"""Means, sums and what is neither are told apart by their gradients."""

import numpy as np
import pytest

from keras_allreduce.one_device import nature
from keras_allreduce.one_device.nature import MEAN, SUM, measured

RNG = np.random.default_rng(0)
PER_SAMPLE = RNG.normal(size=[8, 5])


def rounds(of_batch, samples, noise=0.0, count=1):
    """`whole[round]` and `halves[round]` of a function of samples."""

    def draw(part):
        return of_batch(part + noise * RNG.normal(size=part.shape))

    whole = [draw(samples) for _ in range(count)]
    halves = [(draw(samples[:4]) + draw(samples[4:])) / 2 for _ in range(count)]
    return np.stack(whole), np.stack(halves)


@pytest.mark.parametrize(
    ("of_batch", "kind"),
    [
        (lambda part: part.mean(axis=0), MEAN),
        (lambda part: part.sum(axis=0), SUM),
        (lambda part: part.sum(axis=0) / 64, SUM),
        (lambda part: np.full(5, 0.01), MEAN),
    ],
    ids=["mean", "sum", "constant divisor", "constant"],
)
def test_a_mean_and_a_sum_are_exact(of_batch, kind):
    found = measured(*rounds(of_batch, PER_SAMPLE))
    assert (found.kind, found.is_exact) == (kind, True)
    assert found.residual < 1e-9


@pytest.mark.parametrize(
    "of_batch",
    [
        lambda part: (part @ part.T).mean(axis=0)[:4],
        lambda part: part.mean(axis=0) / np.abs(part).sum(),
        lambda part: part.mean(axis=0) + 0.1 * part.sum(axis=0),
        lambda part: np.maximum(part.max(axis=0), 0),
    ],
    ids=["pairs", "normalized", "a mean and a sum", "maximum"],
)
def test_what_looks_across_the_batch_is_neither(of_batch):
    assert not measured(*rounds(of_batch, PER_SAMPLE)).is_exact


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("of_batch", "kind"),
    [
        (lambda part: part.mean(axis=0), MEAN),
        (lambda part: part.sum(axis=0), SUM),
    ],
    ids=["mean", "sum"],
)
def test_noise_as_large_as_the_values_does_not_hide_them(of_batch, kind, seed):
    samples = np.random.default_rng(seed).normal(1.0, 1.0, size=[8, 50])
    found = measured(*rounds(of_batch, samples, noise=1.0, count=8))
    assert (found.kind, found.is_exact) == (kind, True)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_tells_nothing_is_taken_for_a_mean(value):
    found = measured(np.full([1, 3], value), np.full([1, 3], value))
    assert (found.kind, found.is_exact) == (MEAN, True)


def test_a_rounding_of_half_precision_is_no_difference():
    whole = PER_SAMPLE.mean(axis=0)[np.newaxis]
    rounded = whole * (1 + 0.01 * np.sign(RNG.normal(size=whole.shape)))
    assert not measured(whole, rounded).is_exact
    assert measured(whole, rounded, nature.HALF_PRECISION).is_exact
