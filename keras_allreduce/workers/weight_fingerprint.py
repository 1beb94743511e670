"""Finds weights and optimizer state that differ between workers.

Workers start from the chief's values and then make the same updates. What one
of them sets alone, such as a learning rate or the weights of a file, makes
another model of its own, which no error and no metric shows. So checksums are
compared where a call of Keras and where an epoch of `fit` begins.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_allreduce.compat import (
    distribute,
    keras_config,
    keras_optimizers,
)
from keras_allreduce.workers.checksum import checksum, combined
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.consistency_check import (
    CALLS,
    CALLS_REMEDY,
    ConsistencyCheck,
)
from keras_allreduce.workers.fingerprint import Fingerprint
from keras_allreduce.workers.model_fingerprint import MODEL, ModelCheck

_ALL = "weights and optimizer"
_TRAINED = "trained weights and optimizer"

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
        check: Compares what the workers do.
        sum_over_workers: Sums an int32 tensor that each worker has.
        cluster: The workers.
    """

    def __init__(
        self,
        check: ConsistencyCheck,
        sum_over_workers: Callable[[tf.Tensor, str], tf.Tensor],
        cluster: Cluster,
    ):
        self._check = check
        self._models = ModelCheck(check)
        self._sum = sum_over_workers
        self._is_chief = cluster.rank == 0

    def compare(
        self,
        call: str,
        model: keras.Model,
        *,
        has_trained: bool,
        offer: Mapping[str, Any],
    ) -> list[Fingerprint]:
        """Compares a model where a call or an epoch begins.

        Args:
            call: The call of Keras.
            model: The model.
            has_trained: Whether this call has already trained it. What a
                layer has then changed without an optimizer may differ.
            offer: What else to exchange, in the same message.

        Returns:
            The fingerprints of all workers, by rank, with what they offer.

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
            found = self._check.state(_statement(variables, values, checksums))
        remedy = _remedy(found, variables, model)
        self._check.raise_differences(_ALL, found, remedy)
        return offered

    def broadcast(self, model: keras.Model) -> None:
        """Gives all workers the chief's variables, bit by bit."""
        for variable in all_of(model):
            value = np.asarray(_value(variable), order="C")
            octets = value.reshape(-1).view(np.uint8)
            words = np.zeros(-(-octets.size // 4), np.int32)
            if self._is_chief:
                words.view(np.uint8)[: octets.size] = octets
            got = self._sum(tf.constant(words), "broadcast").numpy()
            chosen = got.view(np.uint8)[: octets.size].view(value.dtype)
            variable.assign(chosen.reshape(value.shape))


def all_of(model: keras.Model) -> list[Any]:
    """Weights and optimizer variables of a model that must be the same."""
    return _same_everywhere(model, model.weights)


def trained(model: keras.Model) -> list[Any]:
    """Those that only an optimizer changes, and its own."""
    return _same_everywhere(model, model.trainable_weights)


def _same_everywhere(model: keras.Model, weights: Sequence[Any]) -> list[Any]:
    optimizers = keras_optimizers.optimizers_of(model)
    # Each replica adds up its own gradients.
    own = {
        id(variable)
        for optimizer in optimizers
        for variable in keras_optimizers.all_accumulators(optimizer)
    }
    candidates = [
        *weights,
        *(v for optimizer in optimizers for v in optimizer.variables),
    ]
    unique = {id(variable): variable for variable in candidates}
    return [
        variable
        for key, variable in unique.items()
        if key not in own
        and not keras_optimizers.takes_gradient_as_value(variable)
    ]


def _value(variable: Any) -> np.ndarray:
    return np.asarray(distribute.read_first(variable.value))


def _remedy(
    found: Sequence[Fingerprint], variables: Sequence[Any], model: keras.Model
) -> str:
    """What to do: steps keep weights alike, custom ones not all."""
    statistics = {id(each) for each in keras_config.moving_statistics(model)}
    different = [
        id(variable)
        for index, variable in enumerate(variables)
        if len({each.facts.get(f"variable {index}") for each in found}) > 1
    ]
    return _STATISTICS if statistics.issuperset(different) else _REMEDY


def _statement(
    variables: Sequence[Any],
    values: Sequence[np.ndarray],
    checksums: Sequence[str],
) -> Fingerprint:
    facts, labels = {"number of variables": str(len(variables))}, {}
    for index, (variable, value, digits) in enumerate(
        zip(variables, values, checksums, strict=True)
    ):
        key = f"variable {index}"
        labels[key] = repr(variable.path)
        facts[key] = _shown(value)
        if value.shape:
            facts[key] += f" (checksum {digits})"
    return Fingerprint(facts, labels)


def _shown(value: np.ndarray) -> str:
    """The first numbers of an array."""
    if not value.shape:
        return str(value)
    first = value.reshape(-1)[:3]
    numbers = " ".join(f"{each:.6g}" for each in first.astype("float64"))
    dots = " ..." if value.size > first.size else ""
    return f"[{numbers}{dots}]"
