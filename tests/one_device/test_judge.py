"""Means, sums and what is neither are told apart, under noise too."""

import numpy as np
import pytest

from keras_allreduce.one_device import judge
from keras_allreduce.one_device.judge import judged
from keras_allreduce.one_device.reduction import (
    COMPARES,
    MEAN,
    SUM,
    UNDECIDED,
    WEIGHTED,
)

RNG = np.random.default_rng(0)
PER_SAMPLE = RNG.normal(size=[8, 5])


def judge_of(of_batch, samples, noise=0.0, count=1, seed=0, **options):
    """The judge's word on a function of samples that draws noise."""
    rng = np.random.default_rng(seed)

    def draw(part):
        return of_batch(part + noise * rng.normal(size=part.shape))

    parts = samples, samples[:4], samples[4:]
    rounds = [[draw(part) for part in parts] for _ in range(count)]
    return judged(
        *(np.stack(each) for each in zip(*rounds, strict=True)), **options
    )


@pytest.mark.parametrize(
    ("of_batch", "kind"),
    [
        (lambda part: part.mean(axis=0), MEAN),
        (lambda part: part.sum(axis=0), SUM),
        (lambda part: part.sum(axis=0) / 64, SUM),
        (lambda _: np.full(5, 0.01), MEAN),
    ],
    ids=["mean", "sum", "constant divisor", "constant"],
)
def test_a_mean_and_a_sum_are_exact(of_batch, kind):
    found = judge_of(of_batch, PER_SAMPLE)
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
def test_what_looks_across_the_batch_compares_samples(of_batch):
    assert judge_of(of_batch, PER_SAMPLE).doubt == COMPARES


def test_halves_that_count_differently_make_a_weighted_mean():
    counts = np.array([1, 1, 1, 1, 1, 0, 0, 0])
    samples = np.concatenate([PER_SAMPLE, counts[:, np.newaxis]], axis=1)

    def of_batch(part):
        return (part[:, :5] * part[:, 5:]).sum(axis=0) / part[:, 5].sum()

    assert judge_of(of_batch, samples).doubt == WEIGHTED


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.5, 0.8])
@pytest.mark.parametrize(
    ("of_batch", "kind"),
    [
        (lambda part: part.mean(axis=0), MEAN),
        (lambda part: part.sum(axis=0), SUM),
    ],
    ids=["mean", "sum"],
)
def test_dropout_does_not_hide_a_mean_nor_a_sum(of_batch, kind, rate, seed):
    samples = np.random.default_rng(seed).normal(1.0, 1.0, size=[8, 50])
    rng = np.random.default_rng(seed)

    def dropped(part):
        return of_batch(part * (rng.uniform(size=part.shape) > rate))

    found = judge_of(dropped, samples, count=64)
    assert (found.kind, found.is_exact) == (kind, True)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "of_batch",
    [
        lambda part: (part @ part.T @ part).mean(axis=0) / len(part),
        lambda part: part.max(axis=0),
        lambda part: np.sqrt(np.var(part, axis=0)),
    ],
    ids=["pairs", "maximum", "deviation"],
)
def test_noise_of_two_samples_hides_no_comparison(of_batch, seed):
    samples = np.random.default_rng(seed).normal(0.5, 1.0, size=[2, 20])
    rng = np.random.default_rng(seed)

    def dropped(part):
        return of_batch(part * (rng.uniform(size=part.shape) > 0.2))

    rounds = [
        [dropped(part) for part in (samples, samples[:1], samples[1:])]
        for _ in range(8)
    ]
    found = judged(*(np.stack(each) for each in zip(*rounds, strict=True)))
    assert found.doubt in (COMPARES, UNDECIDED)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("of_batch", [np.mean, np.sum], ids=["mean", "sum"])
def test_noise_that_hides_the_values_is_undecided(of_batch, seed):
    samples = np.full([8, 20], 0.01)
    found = judge_of(
        lambda part: of_batch(part, axis=0), samples, 1.0, count=8, seed=seed
    )
    assert found.doubt == UNDECIDED


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_tells_nothing_is_not_judged(value):
    same = np.full([1, 3], value)
    assert judged(same, same, same) is None


def test_a_rounding_of_half_precision_is_no_difference():
    whole = PER_SAMPLE.mean(axis=0)[np.newaxis]
    rounded = whole * (1 + 0.01 * np.sign(RNG.normal(size=whole.shape)))
    assert not judged(whole, rounded, rounded).is_exact
    assert judged(whole, rounded, rounded, judge.HALF_PRECISION).is_exact
