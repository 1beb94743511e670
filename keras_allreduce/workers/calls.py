"""Compares the calls of Keras between workers as they begin.

fit, evaluate, predict      call, steps, data; the seed of a shuffle
|-- every epoch             call, epoch, weights, optimizer (drift.py)
|-- end of the last epoch   the same
"""

import random
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from keras_allreduce.compat import keras_calls
from keras_allreduce.compat.keras_calls import KerasCall
from keras_allreduce.workers import data_facts
from keras_allreduce.workers.agreement import (
    CALLS,
    CALLS_REMEDY,
    Agreement,
    Statement,
)
from keras_allreduce.workers.drift import Drift
from keras_allreduce.workers.whereabouts import Whereabouts

_STEPS = "steps in an epoch"
_STEPS_REMEDY = (
    "Give all workers as many batches, or a data set of no known length: "
    "`dataset.repeat()` with `steps_per_epoch`."
)


class Calls:
    """The calls of Keras under one strategy.

    Args:
        agreement: Compares what the workers do.
        whereabouts: Notes the calls.
        drift: Compares models.

    Attributes:
        drift: The same.
    """

    def __init__(
        self, agreement: Agreement, whereabouts: Whereabouts, drift: Drift
    ):
        self._agreement = agreement
        self._whereabouts = whereabouts
        self.drift = drift

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
                `data_facts.steps_of_epochs`.

        Returns:
            31 random bits, the same on all workers; `None` without a store.

        Raises:
            WorkersDifferError: If another worker makes another call, or has
                other data.
        """
        iterator = call.epoch_iterator
        number = self._agreement.next_point
        self._whereabouts.begin_call(number, str(call), iterator)
        facts = {
            "call": f"{call} (its data)",
            _STEPS: data_facts.steps_of_epochs(*steps),
            **data_facts.facts(iterator, dataset),
        }
        statement = Statement(facts, offer=_offer(iterator))
        found = self._agreement.state(statement)
        self._agreement.raise_differences(CALLS, found, _remedy(found))
        seed = int(found[0].offer["seed"])
        if _differ(found, "first batch"):
            data_facts.warn_of_first_batches()
        seeds = _seeds(iterator, found, seed)
        begin = partial(self._begin_epoch, number, seeds)
        keras_calls.on_epochs(iterator, begin, self._end_epoch)
        return seed if self._agreement.is_shared else None

    def _begin_epoch(self, number: int, seeds: random.Random | None) -> None:
        if seeds is not None:
            # Keras shuffles a `PyDataset` with it, and nobody has seeded it.
            random.seed(seeds.getrandbits(64))
        call = keras_calls.current_call()
        if call is None:
            return
        self._whereabouts.rename(number, str(call))
        if call.is_nested:
            # `fit` has compared the model.
            self._agreement.compare(
                CALLS,
                Statement({"call": str(call)}),
                CALLS_REMEDY,
            )
            return
        has_trained = call.epoch is not None and not call.is_first_epoch
        self.drift.compare(str(call), call.model, has_trained=has_trained)

    def _end_epoch(self) -> None:
        call = keras_calls.current_call()
        if call is None or call.is_nested or call.epoch is None:
            return
        number, last = call.epoch
        if number == last:
            # What is compared nowhere else is what the script saves.
            self.drift.compare(f"{call} (end)", call.model, has_trained=True)


def _remedy(found: Sequence[Statement]) -> str:
    """What to do if the statements differ, by the first that does."""
    for key, remedy in (
        ("call", CALLS_REMEDY),
        (_STEPS, _STEPS_REMEDY),
    ):
        if len({each.facts.get(key) for each in found}) > 1:
            return remedy
    return data_facts.REMEDY


def _offer(iterator: Any) -> dict[str, Any]:
    """Values that may differ: a seed, and checksums to compare."""
    return {
        "seed": secrets.randbits(31),
        "state of random": data_facts.state_of_random(),
        "first batch": data_facts.checksum_of_first_batch(iterator),
    }


def _seeds(
    iterator: Any, found: Sequence[Statement], seed: int
) -> random.Random | None:
    """Seeds for Python's `random`, if Keras shuffles by it and it differs."""
    if keras_calls.shuffles_in_python(iterator) and _differ(
        found, "state of random"
    ):
        return random.Random(seed)
    return None


def _differ(found: Sequence[Statement], name: str) -> bool:
    """Whether the offers differ in a value."""
    return len({each.offer[name] for each in found}) > 1
