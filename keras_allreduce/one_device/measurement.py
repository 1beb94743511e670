"""Measures which values of a step are means over samples, and which sums.

The step runs on a few samples and on their two halves, as one device would
(`trial.py`), and `judge` compares the results: in rounds until it can tell,
from the state that the model is in and from another, in which counters are far
on and nothing that the step keeps is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import facts, judge, reduction, samples
from keras_allreduce.one_device.judge import judged
from keras_allreduce.one_device.reduction import (
    MAX,
    MEAN,
    MIN,
    RATIO,
    SUM,
    UNDECIDED,
    Key,
    Reduction,
    Reductions,
)
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.samples import Failure, probe
from keras_allreduce.one_device.trial import Trial

# How often a step with random numbers is measured: at least, before there is
# a doubt of any kind, and at most.
FEWEST_ROUNDS = 8
ROUNDS_FOR_DOUBT = 32
MOST_ROUNDS = 256
MOST_EAGER_ROUNDS = 64

_Round = tuple[Any, Any, Any]
"""The values of a step on the whole example, its first and its second half."""


def reductions_of(
    model: keras.Model,
    name: str,
    step: Callable[[Any], Any],
    data: Any,
    strategy: tf.distribute.Strategy,
    replicas: Replicas,
) -> Reductions:
    """The reductions of a step's targets and logs, measured unless known.

    Args:
        model: The model whose step it is.
        name: The name of the step.
        step: The step; gets a batch, returns logs.
        data: A distributed batch, for its structure.
        strategy: The strategy of the model.
        replicas: Its replicas; all workers use the chief's findings.
    """
    known = facts.of(model).reductions(model, name)
    if known is not None:
        return known
    local = keras.tree.map_structure(
        lambda leaf: (replicas.local_values(leaf) or (leaf,))[0], data
    )
    own = measure(model, step, local, strategy)
    found = Reductions.from_json(replicas.group.broadcast_text(own.to_json()))
    facts.of(model).keep(model, name, found)
    return found


def measure(
    model: keras.Model,
    step: Callable[[Any], Any],
    data: Any,
    strategy: tf.distribute.Strategy,
) -> Reductions:
    """Measures a step, without a trace of it.

    Args:
        model: The model whose step it is.
        step: The step; gets a batch, returns logs.
        data: A batch of one replica, for its structure.
        strategy: The strategy of the model.

    Returns:
        The findings, or the reason for their absence.
    """
    trial = Trial(model, step, strategy)
    example = samples.like(model, data)
    tolerance = _tolerance(model)
    try:
        rounds = _rounds(trial, example, tolerance)
        if isinstance(rounds, Failure):
            return Reductions(failure=rounds.reason)
        states = [_values_of(trial.keys, rounds)]
        for counters in (True, False):
            if not trial.move(counters=counters):
                continue
            rounds = _rounds(trial, example, tolerance)
            if not isinstance(rounds, Failure):
                states.append(_values_of(trial.keys, rounds))
                break
    finally:
        trial.put_back()
    found = {
        key: _reduction(key, states, tolerance, trial.ends.get(key))
        for key in states[0]
        if key[0] != "denominator"
    }
    for key, gradient in trial.terms.items():
        of_term, of_sum = found[key], found.get(gradient, found[key])
        if of_term.doubt == UNDECIDED or (of_term.doubt and of_sum.doubt):
            found[key] = of_sum  # Of many numbers, not of one.
    if trial.communicates:
        # Parts of a batch get from each other in the step what they lack.
        found = {
            key: each if each.is_exact else replace(each, kind=MEAN, doubt="")
            for key, each in found.items()
        }
    return Reductions(found)


def _rounds(
    trial: Trial, example: Any, tolerance: float
) -> list[_Round] | Failure:
    """The results of a step, in as many rounds as it takes to judge it."""
    rounds: list[_Round] = []
    wanted = 2
    while len(rounds) < wanted:
        found = probe(trial, example)
        if isinstance(found, Failure):
            return found
        rounds.append(found)
        if len(rounds) == wanted and _takes_more(trial, rounds, tolerance):
            wanted = max(FEWEST_ROUNDS, 2 * wanted)
    return rounds


def _takes_more(trial: Trial, rounds: list[_Round], tolerance: float) -> bool:
    """Whether it takes more rounds to judge a step.

    Few random numbers, such as a dropout of two samples, may be equal in some
    rounds and then look like a difference: no doubt is due to few rounds.
    """
    if _are_equal(rounds):
        return trial.is_random is not False and len(rounds) < FEWEST_ROUNDS
    if len(rounds) < FEWEST_ROUNDS:
        return True
    values = _values_of(trial.keys, rounds)
    most = MOST_EAGER_ROUNDS if trial.is_random is None else MOST_ROUNDS
    return any(
        len(rounds) < min(most, _most_rounds(key, values, tolerance))
        for key in values
    )


def _most_rounds(key: Key, values: "_Values", tolerance: float) -> int:
    """In how many rounds a value is measured, as these have it."""
    if key[0] in ("denominator", "inputs"):
        return 0
    if key[0] in reduction.STATES:  # One state does not tell its decay.
        is_random = any((part != part[:1]).any() for part in values[key])
        return ROUNDS_FOR_DOUBT if is_random else 0
    doubt = _reduction(key, [values], tolerance).doubt
    if key[0] in reduction.SHOWN:
        return ROUNDS_FOR_DOUBT if doubt == UNDECIDED else 0
    if doubt == UNDECIDED:
        return MOST_ROUNDS
    return ROUNDS_FOR_DOUBT if doubt else 0


_Values = dict[Key, tuple[np.ndarray, ...]]
"""The whole, first and second of each value; `[round, element]`."""


def _values_of(keys: Sequence[Key], rounds: Sequence[_Round]) -> _Values:
    """The values of rounds that returned those of `keys`."""
    return {
        key: tuple(
            np.stack([values[index] for values in part])
            for part in zip(*rounds, strict=True)
        )
        for index, key in enumerate(keys)
    }


def _reduction(
    key: Key,
    states: Sequence[_Values],
    tolerance: float,
    end: str | None = None,
) -> Reduction:
    """The reduction of a value, judged in one state or in two.

    Args:
        key: The key of the value.
        states: The values in each state.
        tolerance: Relative difference that is rounding.
        end: The kind by the op that it ends in, if that is a reduction.
    """
    if key[0] in reduction.STATES:
        return _of_state(key, states, tolerance)
    if end == reduction.COMPARES:
        return Reduction(doubt=end)
    found = [_in_state(key, each, tolerance) for each in states if key in each]
    if any(found):
        agreed = _agreed(found)
        is_extreme = end in (MAX, MIN) or agreed.doubt == reduction.COMPARES
        if key[0] in reduction.SHOWN and is_extreme:
            return _extreme([each[key] for each in states]) or agreed
        return agreed
    if any(reduction.denominator_key(key) in each for each in states):
        return Reduction(RATIO, doubt=UNDECIDED)
    if key[0] == "count" and end is None:
        end = SUM  # Nothing in the example counts.
    return Reduction(doubt=UNDECIDED) if end is None else Reduction(end)


def _extreme(states: Sequence[tuple[np.ndarray, ...]]) -> Reduction | None:
    """The reduction of a maximum or a minimum over the samples."""
    for kind, of_both in ((MAX, np.maximum), (MIN, np.minimum)):
        if all(
            np.array_equal(whole, of_both(first, second))
            for whole, first, second in states
        ):
            return Reduction(kind)
    return None


def _in_state(key: Key, state: _Values, tolerance: float) -> Reduction | None:
    whole, first, second = state[key]
    if key[0] in reduction.SHOWN and whole.shape != first.shape:
        return Reduction()  # A row for each sample.
    if key[0] == "inputs":  # Rows of a half are rows of the whole.
        rows = np.concatenate([first, second], axis=1)
        found = judged(whole, rows, np.zeros_like(rows), tolerance)
    else:
        found = judged(whole, first, second, tolerance)
    counts = state.get(reduction.denominator_key(key))
    if counts is None or key[0] == "inputs":
        return found
    of_whole, of_first, of_second = counts
    is_constant = (of_whole == of_first) & (of_whole == of_second)
    if not of_whole.all() or is_constant.all():
        return found
    # As a mean of halves that count by their denominators. It is one also if
    # the halves of this example happen to count alike.
    one, other = (
        2 * np.where(count == 0, 0, half) * count / of_whole
        for half, count in ((first, of_first), (second, of_second))
    )
    as_ratio = judged(whole, one, other, tolerance)
    if as_ratio is None:
        return found
    is_ratio = as_ratio.kind == MEAN and as_ratio.is_exact
    if is_ratio or as_ratio.doubt == UNDECIDED:
        return replace(as_ratio, kind=RATIO)
    if found is None:  # A half counts nothing, so its mean is 0 / 0.
        doubt = as_ratio.doubt or reduction.COMPARES
        return replace(as_ratio, kind=RATIO, doubt=doubt)
    return found


def _agreed(found: Sequence[Reduction | None]) -> Reduction:
    """One reduction for all states; those that tell nothing are left out."""
    told = [each for each in found if each is not None]
    if not told:
        return Reduction()
    decided = [each for each in told if each.doubt != UNDECIDED] or told
    first = decided[0]
    if all(each.kind == first.kind and each.is_exact for each in decided):
        return first
    doubts = [each.doubt for each in decided if each.doubt]
    if doubts:
        return replace(first, doubt=doubts[0])
    return replace(first, doubt=reduction.COMPARES)


def _of_state(
    key: Key, states: Sequence[_Values], tolerance: float
) -> Reduction:
    """The reduction of a variable: after = decay * before + mean or sum."""
    before, parts = [], []
    for state in states:
        if key not in state:
            continue
        both = state[key]
        size = both[0].shape[1] // 2
        before.append(both[0][:1, :size])
        parts.append([each[:, size:] for each in both])
    found = _added(before, parts, 1.0, tolerance)
    is_random = any((part[0][:1] != part[0]).any() for part in parts)
    if found is not None and found.is_exact and is_random:
        return found
    if len(before) == 2 and (before[0] != before[1]).any():
        decay = _decay(before, parts)
        kept = _added(before, parts, decay, tolerance)
        if kept is not None and kept.is_exact:
            return replace(kept, decay=decay)
    if found is not None and found.is_exact:
        return found
    if found is None:
        return Reduction()
    return replace(found, kind=reduction.FIRST, doubt=reduction.STATE)


def _decay(
    before: Sequence[np.ndarray], parts: Sequence[Sequence[np.ndarray]]
) -> float:
    """The decay of a state, from two states; by least squares."""
    moved = (before[1] - before[0])[0]
    changed = parts[1][0].mean(axis=0) - parts[0][0].mean(axis=0)
    decay = float(changed @ moved / (moved @ moved))
    for exact in (0.0, 1.0):
        if abs(decay - exact) < judge.EXACT:
            return exact
    return decay


def _added(
    before: Sequence[np.ndarray],
    parts: Sequence[Sequence[np.ndarray]],
    decay: float,
    tolerance: float,
) -> Reduction | None:
    """The reduction of the addend of a decayed state, in all states.

    `None` if nothing is ever added.
    """
    found = []
    for kept, after in zip(before, parts, strict=True):
        added = [each - decay * kept for each in after]
        size = float(np.abs(kept).max(initial=0.0))
        largest = float(np.abs(added).max(initial=0.0))
        if largest <= 1e-6 * size:
            continue
        # What is added has lost the digits of what is kept.
        lost = judge.LOST_IN_STATE * abs(decay) * size / largest
        most = max(tolerance, min(lost, judge.OF_STATE))
        found.append(judged(added[0], added[1], added[2], most))
    return _agreed(found) if any(found) else None


def _tolerance(model: keras.Model) -> float:
    """Relative difference that is rounding."""
    if keras_compat.computes_in_half_precision(model):
        return judge.HALF_PRECISION
    on_gpus = bool(tf.config.list_logical_devices("GPU"))
    if on_gpus and tf.config.experimental.tensor_float_32_execution_enabled():
        return judge.TF32
    return judge.EXACT


def _are_equal(rounds: Sequence[_Round]) -> bool:
    """Whether all rounds gave the same."""
    return all(
        np.array_equal(one, another, equal_nan=True)
        for first, *others in zip(*rounds, strict=True)
        for other in others
        for one, another in zip(first, other, strict=True)
    )
