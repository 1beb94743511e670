"""Finds weights and optimizer state that differ between workers.

Workers start from the chief's values and then make the same updates. Values
that one of them sets alone, such as a learning rate or the weights of a file,
make another model of it, which no error and no metric shows. So checksums are
compared where a call of Keras and where an epoch of `fit` begins.

Where they differ, so may only the rounding: an update that sums, such as
`global_clipnorm`, has other last bits on another number of threads.

    checksums of all differ     rare; else nothing more crosses
    |-- checksums of each       which variables, and of the same shapes?
    |-- values of the chief     of those; each worker computes how far it is off
    |-- how far all are         rounding: all take the chief's values
                                more: an error that shows how much
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from keras_allreduce.compat import distribute
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.workers.consistency_check import (
    CALLS,
    CALLS_REMEDY,
    ConsistencyCheck,
)
from keras_allreduce.workers.fingerprint import Fingerprint, checksum, combined
from keras_allreduce.workers.model_fingerprint import MODEL, ModelCheck

_ALL = "weights and optimizer"
_TRAINED = "trained weights and optimizer"

# Of 1, in each dtype of weights.
_LAST_BIT = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}

_REMEDY = (
    "Load or set them on all workers alike, or take the chief's with "
    "`strategy.broadcast(model)` on all workers."
)


_STATISTICS = (
    "After a custom training loop each worker has the moving statistics of its "
    "own samples: use `BatchNormalization(synchronized=True)`, or take the "
    "chief's with `strategy.broadcast(model)` on all workers before "
    "`evaluate`, `predict` and `fit`. If you have set them, do so on all."
)


class WeightCheck:
    """Compares the variables of models between workers.

    Args:
        check: The consistency check.
        sum_over_workers: Sums an int32 tensor that each worker has.
    """

    def __init__(
        self,
        check: ConsistencyCheck,
        sum_over_workers: Callable[[tf.Tensor, str], tf.Tensor],
    ):
        self._check = check
        self._models = ModelCheck(check)
        self._sum = sum_over_workers
        self._has_said = False

    def compare(
        self,
        call: str,
        model: keras.Model,
        *,
        has_trained: bool,
        offer: Mapping[str, Any],
    ) -> list[Fingerprint]:
        """Compares a model where a call or an epoch begins.

        Variables that differ by rounding are the chief's afterwards.

        Args:
            call: The call of Keras.
            model: The model.
            has_trained: Whether this call has already trained it. What a
                layer has then changed without an optimizer may differ.
            offer: Further facts to exchange in the same message.

        Returns:
            The fingerprints of all workers, by rank, with their offers.

        Raises:
            WorkersDifferError: If a call or a variable differs.
        """
        variables = trained(model) if has_trained else all_of(model)
        values = [_value(variable) for variable in variables]
        checksums = [checksum(value) for value in values]
        what = _TRAINED if has_trained else _ALL
        facts = {"call": call, what: combined(checksums)}
        if not has_trained:
            offer = {**offer, MODEL: self._models.checksum(model)}
        offered = self._check.state(Fingerprint(facts, offer=offer))
        found = offered
        if len({each.facts.get("call") for each in found}) > 1:
            self._check.raise_differences(CALLS, found, CALLS_REMEDY)
        if len({each.offer.get(MODEL) for each in found}) > 1:
            self._models.compare(model)
        if len({each.facts.get(what) for each in found}) > 1:
            self._settle(model, variables, values, checksums)
        return offered

    def _settle(
        self,
        model: keras.Model,
        variables: Sequence[Any],
        values: Sequence[np.ndarray],
        checksums: Sequence[str],
    ) -> None:
        """Agrees differences of rounding away, and raises if there are more."""
        found = self._check.state(_statement(variables, values, checksums))
        if len({str(each.offer["forms"]) for each in found}) > 1:
            self._check.raise_differences(_ALL, found, _REMEDY)
        unlike = [
            index
            for index in range(len(variables))
            if len({each.facts[_key(index)] for each in found}) > 1
        ]
        chiefs = {index: self._chiefs(values[index]) for index in unlike}
        own = {
            str(index): relative_difference(values[index], value)
            for index, value in chiefs.items()
        }
        offered = self._check.state(Fingerprint({}, offer={"off": own}))
        off = {
            index: [each.offer["off"][str(index)] for each in offered]
            for index in unlike
        }
        beyond = [
            index
            for index in unlike
            if not max(off[index]) <= rounding(values[index].dtype)
        ]
        if beyond:
            self._check.raise_differences(
                _ALL,
                _with_amounts(found, beyond, off),
                _remedy([variables[index] for index in beyond], model),
            )
        for index, value in chiefs.items():
            variables[index].assign(value)
        self._say_once(variables, off)

    def _say_once(
        self, variables: Sequence[Any], off: Mapping[int, Sequence[float]]
    ) -> None:
        if self._has_said or not off:
            return
        self._has_said = True
        worst = max(off, key=lambda index: max(off[index]))
        logging.warning(
            "keras_allreduce: weights of the workers differ by rounding, by up "
            "to %.1e of the largest number of %r: their updates sum in other "
            "orders, as on other CPUs or numbers of threads. All take the "
            "chief's, now and wherever this is so.",
            max(off[worst]),
            variables[worst].path,
        )

    def broadcast(self, model: keras.Model) -> None:
        """Gives all workers the chief's variables, bit by bit."""
        for variable in all_of(model):
            variable.assign(self._chiefs(_value(variable)))

    def _chiefs(self, value: np.ndarray) -> np.ndarray:
        """The chief's array, of one shape and dtype on all, bit by bit."""
        octets = np.asarray(value, order="C").reshape(-1).view(np.uint8)
        words = np.zeros(-(-octets.size // 4), np.int32)
        if self._check.rank == 0:
            words.view(np.uint8)[: octets.size] = octets
        got = self._sum(tf.constant(words), "broadcast").numpy()
        chosen = got.view(np.uint8)[: octets.size].view(value.dtype)
        return np.asarray(chosen.reshape(value.shape))


def all_of(model: keras.Model) -> list[Any]:
    """Weights and optimizer variables of a model that must be the same."""
    return _same_everywhere(model, model.weights)


def trained(model: keras.Model) -> list[Any]:
    """Those that only an optimizer changes, and its own."""
    return _same_everywhere(model, model.trainable_weights)


def _same_everywhere(model: keras.Model, weights: Sequence[Any]) -> list[Any]:
    optimizers = keras_compat.optimizers_of(model)
    # Each replica adds up its own gradients.
    own = {
        id(variable)
        for optimizer in optimizers
        for variable in keras_compat.all_accumulators(optimizer)
    }
    candidates = [
        *weights,
        *(v for optimizer in optimizers for v in optimizer.variables),
    ]
    unique = {id(variable): variable for variable in candidates}
    return [
        variable
        for key, variable in unique.items()
        if key not in own and not keras_compat.takes_gradient_as_value(variable)
    ]


def _value(variable: Any) -> np.ndarray:
    return np.asarray(distribute.read_first(variable.value))


def _remedy(different: Sequence[Any], model: keras.Model) -> str:
    """The remedy: steps keep weights alike, custom ones not all."""
    statistics = {id(each) for each in keras_compat.moving_statistics(model)}
    are_all = statistics.issuperset(map(id, different))
    return _STATISTICS if are_all else _REMEDY


def relative_difference(value: np.ndarray, of_chief: np.ndarray) -> float:
    """How far an array is off, as a part of the chief's largest number.

    Infinite if something else than a finite number of floats differs.
    """
    if checksum(value) == checksum(of_chief):
        return 0.0
    if not _is_float(value.dtype):
        return float("inf")
    own, chiefs = value.astype("float64"), of_chief.astype("float64")
    finite = np.isfinite(own) & np.isfinite(chiefs)
    if not np.array_equal(own[~finite], chiefs[~finite], equal_nan=True):
        return float("inf")
    distance = np.max(np.abs(own[finite] - chiefs[finite]), initial=0.0)
    largest = np.max(np.abs(chiefs[finite]), initial=0.0)
    if not largest:
        return float("inf") if distance else 0.0
    return float(distance / largest)


def rounding(dtype: Any) -> float:
    """The largest relative difference that is taken for one of rounding.

    Hundreds of last bits: an epoch adds up those of each of its steps.
    """
    if not _is_float(dtype):
        return 0.0
    return min(256 * _LAST_BIT.get(tf.as_dtype(dtype).name, 1.0), 1 / 16)


def _is_float(dtype: Any) -> bool:
    return bool(tf.as_dtype(dtype).is_floating)


def _key(index: int) -> str:
    return f"variable {index}"


def _statement(
    variables: Sequence[Any],
    values: Sequence[np.ndarray],
    checksums: Sequence[str],
) -> Fingerprint:
    facts, labels = {"number of variables": str(len(variables))}, {}
    for index, (variable, value, digits) in enumerate(
        zip(variables, values, checksums, strict=True)
    ):
        labels[_key(index)] = repr(variable.path)
        facts[_key(index)] = _shown(value)
        if value.shape:
            facts[_key(index)] += f" (checksum {digits})"
    forms = [f"{value.dtype} {value.shape}" for value in values]
    return Fingerprint(facts, labels, {"forms": forms})


def _with_amounts(
    found: Sequence[Fingerprint],
    indices: Sequence[int],
    off: Mapping[int, Sequence[float]],
) -> list[Fingerprint]:
    """The statements on some variables, with how far each worker is off."""

    def shown(each: Fingerprint, rank: int, index: int) -> str:
        amount = off[index][rank]
        return each.facts[_key(index)] + (
            f", off by {amount:.1e}" if amount else ""
        )

    return [
        replace(
            each,
            facts={_key(index): shown(each, rank, index) for index in indices},
        )
        for rank, each in enumerate(found)
    ]


def _shown(value: np.ndarray) -> str:
    """The first numbers of an array."""
    if not value.shape:
        return str(value)
    first = value.reshape(-1)[:3]
    numbers = " ".join(f"{each:.6g}" for each in first.astype("float64"))
    dots = " ..." if value.size > first.size else ""
    return f"[{numbers}{dots}]"
