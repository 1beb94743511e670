"""Checks that all workers run the same model, options and steps.

Workers that run different code do not fail by themselves: each waits for a
collective that another never starts. So each publishes its next action in
the store, and reads those of the others.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce import debug
from keras_allreduce.compat import keras_calls
from keras_allreduce.environment import DOOR
from keras_allreduce.version import __version__
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkersDifferError
from keras_allreduce.workers.fingerprint import (
    Fingerprint,
    combined,
    difference,
    in_another_order,
    without_numbers,
)
from keras_allreduce.workers.progress import Progress
from keras_allreduce.workers.store import KeyValueStore

ORDER = (
    "Make layers in the same order on all workers: a Python `set` has another "
    "order in each process, `sorted(...)` has one."
)

_STEPS = "models and steps"

_CONSTANTS = "variables of zeros and ones"

REMEDY = "Run the same script, in the same environment, on all workers."

CALLS = "calls of Keras and data"
CALLS_REMEDY = (
    "Make the same calls on all workers, and stop in the same epoch: pass "
    "callbacks that decide to all of them."
)
"""What to do if one worker is in another call, or another epoch."""


class ConsistencyCheck:
    """Compares the actions of the workers under one strategy.

    Args:
        cluster: The workers.
        store: The texts that they publish; `None` without TensorFlow's
            coordination service: then nothing is compared.
        progress: Numbers the points at which this worker compares.
        paths_of_gradients: Returns the paths of as many gradients, or nothing.

    Attributes:
        rank: Number of this worker.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: KeyValueStore | None,
        progress: Progress,
        paths_of_gradients: Callable[[int], Sequence[str]] = lambda count: (),
    ):
        self._cluster = cluster
        self._store = store
        self._progress = progress
        self._paths_of_gradients = paths_of_gradients
        self._lists: list[dict[str, str]] = []
        # Variables of zeros and ones, which only the next comparison sees.
        self._num_constants, self._constants = 0, ""
        self._last_constant = ""
        # Of the last comparison.
        self._point = 0
        self.rank = cluster.rank

    def barrier(self) -> tuple[float, float]:
        """Waits until all workers have called this.

        Returns:
            When this one came, and when it knew that all had come, in seconds
            since the epoch.
        """
        entered = time.time()
        self._all_gather("a barrier", "")
        return entered, time.time()

    def all_gather_text(self, name: str, text: str) -> list[str]:
        """Sends a text to all workers, and returns those of all, by rank.

        To be called on all workers, in the same order.

        Args:
            name: Its subject, for errors.
            text: The text of this worker.

        Raises:
            RuntimeError: See `compare`.
        """
        texts = self._all_gather(f"a gather ({name})", text)
        self._linger()
        return texts

    def _all_gather(self, kind: str, text: str) -> list[str]:
        """The texts of all workers, at the next point of each script."""
        if self._store is None:
            return [text] * len(self._cluster.tasks)
        with self._progress.point() as self._point:
            return self._store.all_gather(self._point, kind, text)

    def _linger(self) -> None:
        """Keeps the chief until the others have read the last point."""
        if self._store is not None:
            self._store.linger(self._point)

    def name(self, rank: int) -> str:
        """A worker, as messages name it."""
        return self._cluster.name(rank)

    @property
    def is_shared(self) -> bool:
        """Whether the workers read each other's fingerprints at all."""
        return self._store is not None

    def compare(
        self, name: str, fingerprint: Fingerprint, remedy: str = REMEDY
    ) -> list[Fingerprint]:
        """Compares at the next point in the script of each worker.

        Args:
            name: The subject of the facts.
            fingerprint: Of this worker.
            remedy: Advice for the case that the facts differ.

        Returns:
            The fingerprints of all workers, by rank.

        Raises:
            WorkersDifferError: On every worker, if the facts of one differ
                from the chief's.
            WorkerError: If a worker does not publish its own in time.
        """
        debug.log(f"compares {name} with the other workers")
        found = self.state(fingerprint)
        self.raise_differences(name, found, remedy)
        debug.log(f"all workers have the same {name}")
        return found

    def state(self, fingerprint: Fingerprint) -> list[Fingerprint]:
        """The fingerprints of all workers, by rank, compared by nobody."""
        # All are counted together: where one worker makes a variable and
        # another goes on to its step, these two meet.
        both = self._with_constants(fingerprint)
        texts = self._all_gather("a comparison", both.to_json())
        return [Fingerprint.from_json(text) for text in texts]

    def raise_differences(
        self, name: str, found: Sequence[Fingerprint], remedy: str
    ) -> None:
        """Raises if the facts differ in the last exchange."""
        name_of = self._cluster.name
        differences = [
            each
            for rank in range(1, len(found))
            for each in difference(
                found[0], found[rank], (name_of(0), name_of(rank))
            )
        ]
        if not differences:
            return
        self._linger()
        raise WorkersDifferError(
            f"All workers must have the same {name}. Received: "
            f"{'; '.join(differences)}. {remedy}"
        )

    def compare_gradients(self, gradients: Sequence[Any]) -> None:
        """Compares the gradients that a step sends, once for each new list.

        A step may be traced again on one worker alone, for another size of
        its batch; the others know its gradients.

        Args:
            gradients: Gradients in the order of the variables. Their dtypes
                and shapes are compared; the plan of packs follows from them.

        Raises:
            WorkerError: See `compare`.
        """
        facts = _facts_of(gradients)
        if facts in self._lists:
            return
        self._lists.append(facts)
        fingerprint = _of_gradients(
            facts, self._paths_of_gradients(len(gradients))
        )
        found = self.compare(_STEPS, fingerprint)
        order = in_another_order("gradient", found)
        self.raise_differences(_STEPS, order, ORDER)

    def note_constant(self, initial_value: Any) -> bool:
        """Notes a new variable if it begins with zeros or ones.

        Its value need not come from the chief, and the workers need not wait
        for each other: the next comparison, of anything, includes it. Most
        variables are so: biases, moving statistics, the state of optimizers
        and metrics.

        Args:
            initial_value: See `compare_initial_value`.

        Returns:
            Whether it does.
        """
        constant = keras_calls.constant_of(initial_value)
        if constant is None:
            return False
        self._num_constants += 1
        self._constants = combined([self._constants, constant])
        path = keras_calls.path_of_new_variable()
        self._last_constant = f"{path!r} ({constant})"
        return True

    def _with_constants(self, fingerprint: Fingerprint) -> Fingerprint:
        """A fingerprint that includes the variables of zeros and ones."""
        if not self._num_constants:
            return fingerprint
        fact = f"{self._num_constants} of checksum {self._constants}"
        label = f"variables of zeros and ones up to {self._last_constant}"
        return replace(
            fingerprint,
            facts={**fingerprint.facts, _CONSTANTS: fact},
            labels={**fingerprint.labels, _CONSTANTS: label},
        )

    def compare_initial_value(self, initial_value: Any) -> Any:
        """Compares a variable as it is made; its value comes from the chief.

        Args:
            initial_value: Value of a new variable, or a function that makes
                it.

        Returns:
            A function that makes the same value, and raises a `WorkerError`
            if another worker makes a variable of another dtype or shape.
        """
        path = keras_calls.path_of_new_variable()

        def compared() -> Any:
            made = callable(initial_value)
            value = initial_value() if made else initial_value
            tensor = getattr(value, "wrapped_value", value)
            if isinstance(tensor, tf.Tensor):
                labels = {} if path is None else {"variable": f"{path!r}"}
                fingerprint = Fingerprint({"variable": _spec(tensor)}, labels)
                self.compare(_STEPS, fingerprint)
            return value

        return compared

    def broadcast_text(self, text: str) -> str:
        """Returns the text of the chief on every worker.

        Args:
            text: The text of this worker.

        Raises:
            WorkerError: See `compare`.
        """
        fingerprint = Fingerprint({}, offer={"text": text})
        found = self.compare(_STEPS, fingerprint)
        return str(found[0].offer["text"])


def _facts_of(gradients: Sequence[Any]) -> dict[str, str]:
    facts = {"number of gradients": str(len(gradients))}
    for index, gradient in enumerate(gradients):
        facts[f"gradient {index}"] = _spec(gradient)
    # Gradients of mixed precision are float32 as well.
    return facts | {"dtype policy": keras.config.dtype_policy().name}


def _of_gradients(facts: dict[str, str], paths: Sequence[str]) -> Fingerprint:
    labels = {
        f"gradient {index}": f"gradient of {path!r}"
        for index, path in enumerate(paths)
    }
    order = {"paths": json.dumps(without_numbers(paths))}
    return Fingerprint(facts, labels, order)


def _spec(gradient: Any) -> str:
    dims = tf.TensorShape(gradient.shape).dims
    shape = "of unknown shape" if dims is None else [d.value for d in dims]
    kind = "rows of " if isinstance(gradient, tf.IndexedSlices) else ""
    return f"{kind}{gradient.dtype.name} {shape}"


def environment(devices: Sequence[str]) -> dict[str, Any]:
    """Facts that must be the same on all workers before anything is traced.

    Args:
        devices: Names of the devices of this worker.
    """
    python = platform.python_version_tuple()
    return {
        "keras_allreduce": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": ".".join(python[:2]),
        DOOR: os.environ.get(DOOR, "1"),
        "devices": len(devices),
        "device_type": tf.DeviceSpec.from_string(devices[0]).device_type,
    }
