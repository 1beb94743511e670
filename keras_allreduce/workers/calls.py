"""Compares the calls of Keras between workers as they begin.

fit, evaluate, predict      call, steps, data; the seed of a shuffle
|-- first epoch             the model and its compile options
|-- every epoch             call, epoch, weights and optimizer; first batch of
|                           the epoch before
|-- end of the last epoch   the same
"""

import contextlib
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from keras_allreduce.compat import keras_calls
from keras_allreduce.compat.keras_calls import KerasCall
from keras_allreduce.workers import data_fingerprint
from keras_allreduce.workers.consistency_check import (
    CALLS,
    CALLS_REMEDY,
    ConsistencyCheck,
)
from keras_allreduce.workers.fingerprint import Fingerprint
from keras_allreduce.workers.progress import Progress
from keras_allreduce.workers.weight_fingerprint import WeightCheck

_SEED, _RANDOM, _NUMPY = "seed", "state of random", "state of numpy"

_STEPS = "steps in an epoch"
_STEPS_REMEDY = (
    "Give all workers as many batches, or a data set of no known length: "
    "`dataset.repeat()` with `steps_per_epoch`."
)


class Calls:
    """The calls of Keras under one strategy.

    Args:
        check: The consistency check.
        progress: Notes the calls.
        weights: Compares models.

    Attributes:
        weights: The same.
    """

    def __init__(
        self,
        check: ConsistencyCheck,
        progress: Progress,
        weights: WeightCheck,
    ):
        self._check = check
        self._progress = progress
        self.weights = weights

    def begin(
        self,
        call: KerasCall,
        dataset: Any,
        steps: tuple[int | None, int | None],
    ) -> int | None:
        """Compares a call that has its data distributed.

        Args:
            call: The call.
            dataset: The data set that Keras has made.
            steps: Steps that were asked for and batches of the data set; see
                `data_fingerprint.steps_of_epochs`.

        Returns:
            31 random bits, the same on all workers; `None` without a store.

        Raises:
            WorkersDifferError: If another worker makes another call, or has
                other data.
        """
        iterator = call.epoch_iterator
        number = self._progress.begin_call(str(call), iterator)
        facts = {
            "call": f"{call} (its data)",
            _STEPS: data_fingerprint.steps_of_epochs(*steps),
            **data_fingerprint.facts_of(iterator, dataset),
        }
        fingerprint = Fingerprint(
            facts, offer=_offer(iterator) | data_fingerprint.shards(dataset)
        )
        found = self._check.state(fingerprint)
        self._check.raise_differences(CALLS, found, _remedy(found))
        if data_fingerprint.are_shards(found):
            data_fingerprint.warn_of_shards()
        seed = int(found[0].offer[_SEED])
        epochs = _Epochs(number, _Seeds.agreed(iterator, found, seed))
        epochs.warn(found)
        self._follow(iterator, epochs)
        return seed if self._check.is_shared else None

    def _follow(self, iterator: Any, epochs: "_Epochs") -> None:
        # Before its first epoch Keras tells a `PyDataset` that one has ended.
        epochs.seeds.seed()
        keras_calls.on_first_batches(iterator, epochs.note)
        keras_calls.on_epochs(
            iterator,
            partial(self._begin_epoch, epochs),
            partial(self._end_epoch, epochs),
        )

    def _begin_epoch(self, epochs: "_Epochs") -> None:
        epochs.seeds.seed()
        call = keras_calls.current_call()
        if call is None:
            return
        self._progress.rename(epochs.number, str(call))
        if call.is_nested:
            # `fit` has compared the model.
            facts = {"call": str(call)}
            fingerprint = Fingerprint(facts, offer=epochs.first_batch)
            found = self._check.compare(CALLS, fingerprint, CALLS_REMEDY)
        else:
            found = self.weights.compare(
                str(call),
                call.model,
                has_trained=call.epoch is not None and not call.is_first_epoch,
                offer=epochs.first_batch,
            )
        epochs.warn(found)

    def _end_epoch(self, epochs: "_Epochs") -> None:
        call = keras_calls.current_call()
        if call is None or call.is_nested or call.epoch is None:
            return
        if call.epoch == call.epochs:
            # The weights that the script saves are compared nowhere else.
            found = self.weights.compare(
                f"{call} (end)",
                call.model,
                has_trained=True,
                offer=epochs.first_batch,
            )
            epochs.warn(found)


@dataclass(frozen=True)
class _Seeds:
    """Seeds that are alike on all workers as a call and an epoch begin.

    Attributes:
        source: Of the seeds, the same on all workers.
        python: Whether Python's `random` is seeded.
        numpy: Whether `numpy.random` is.
    """

    source: random.Random
    python: bool
    numpy: bool

    @classmethod
    def agreed(
        cls, iterator: Any, found: Sequence[Fingerprint], seed: int
    ) -> "_Seeds":
        """Seeds unseeded generators that may shuffle a `PyDataset`.

        Args:
            iterator: Keras's, over the epochs.
            found: The offers of all workers.
            seed: The same on all workers.
        """
        return cls(
            random.Random(seed),
            python=keras_calls.shuffles_in_python(iterator)
            and _differ(found, _RANDOM),
            numpy=keras_calls.is_py_dataset(iterator)
            and _differ(found, _NUMPY)
            and all(each.offer[_NUMPY] for each in found),
        )

    def seed(self) -> None:
        """Seeds them with the next numbers."""
        if self.python:
            random.seed(self.source.getrandbits(64))
        if self.numpy:
            np.random.seed(self.source.getrandbits(32))


@dataclass
class _Epochs:
    """The epochs of one call of Keras.

    Attributes:
        number: Number of the call.
        seeds: Seeded as each begins.
        first_batch: Checksums of the first batch of the last epoch, to compare
            where the next begins; of other data than a `PyDataset`, empty.
        has_warned: Whether it was said that those differ.
    """

    number: int
    seeds: _Seeds
    first_batch: dict[str, str] = field(default_factory=dict)
    has_warned: bool = False

    def note(self, batch: Any) -> None:
        """Notes the first batch of an epoch, in the thread that makes it."""
        # Any object of the script; Keras says so if it cannot be read.
        with contextlib.suppress(TypeError, ValueError):
            self.first_batch = data_fingerprint.of_batch(batch)

    def warn(self, found: Sequence[Fingerprint]) -> None:
        """Warns, once, if first batches are of other samples."""
        if not self.has_warned and data_fingerprint.are_other_samples(found):
            self.has_warned = True
            data_fingerprint.warn_of_first_batches()


def _remedy(found: Sequence[Fingerprint]) -> str:
    """The remedy for the first difference between fingerprints."""
    for key, remedy in (
        ("call", CALLS_REMEDY),
        (_STEPS, _STEPS_REMEDY),
    ):
        if len({each.facts.get(key) for each in found}) > 1:
            return remedy
    return data_fingerprint.REMEDY


def _offer(iterator: Any) -> dict[str, Any]:
    """Values that may differ: a seed, and checksums to compare."""
    return {
        _SEED: secrets.randbits(31),
        _RANDOM: data_fingerprint.state_of_random(),
        _NUMPY: data_fingerprint.state_of_unseeded_numpy(),
        **data_fingerprint.of_batch(keras_calls.first_batch(iterator)),
    }


def _differ(found: Sequence[Fingerprint], name: str) -> bool:
    """Whether the offers differ in a value."""
    return len({each.offer[name] for each in found}) > 1
