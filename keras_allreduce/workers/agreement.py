"""Checks that all workers run the same model, options and steps.

Workers that run different code do not fail by themselves: each waits for a
collective that another never starts. So each publishes what it is about to do
in the `Store`, and reads what the others do.
"""

import itertools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.version import __version__
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import WorkersDifferError
from keras_allreduce.workers.store import NoStore, Store

_REMEDY = "Run the same script, in the same environment, on all workers."


def steps_of_epochs(asked: int | None, batches: int | None) -> str:
    """How many steps Keras makes in the epochs of `fit`, as a message says it.

    Keras counts batches across epochs: a data set of 5 that is asked for 2
    steps gives 2, 2 and 1, and begins again.

    Args:
        asked: `steps_per_epoch`, or `None`.
        batches: Batches of the data set, or `None` if not known.
    """
    if asked is None:
        return "not known" if batches is None else str(batches)
    if batches is None or batches % asked == 0:
        return str(asked)
    if batches < asked:
        return str(batches)
    number = batches // asked + 1
    return f"{asked}, but {batches % asked} in epoch {number}"


class Agreement:
    """Compares what the workers do under one strategy.

    Args:
        cluster: The workers.
        store: What they publish.

    Attributes:
        rank: Number of this worker.
    """

    def __init__(self, cluster: Cluster, store: Store | NoStore):
        self._cluster = cluster
        self._store = store
        self._lists: list[dict[str, str]] = []
        # Variables and gradients are counted together: where one worker makes
        # a variable and another goes on to its step, these two meet.
        self._points = itertools.count()
        self._meetings = itertools.count()
        self.rank = cluster.rank

    def meet(self) -> tuple[float, float]:
        """Waits until all workers have called this.

        Returns:
            When this one came, and when it knew that all had come, in seconds
            since the epoch.
        """
        entered = time.time()
        self._store.exchange(f"meeting/{next(self._meetings)}", "")
        return entered, time.time()

    def exchange(self, name: str, text: str) -> list[str]:
        """Sends a text to all workers, and returns those of all, by rank.

        To be called on all workers, in the same order.

        Args:
            name: What it is about, for errors.
            text: The text of this worker.

        Raises:
            RuntimeError: See `compare`.
        """
        key = f"{name}/{next(self._meetings)}"
        texts = self._store.exchange(key, text)
        self._store.let_all_read(key)
        return texts

    def compare(
        self,
        name: str,
        facts: Mapping[str, Any],
        point: int | None = None,
        remedy: str = _REMEDY,
    ) -> None:
        """Raises on every worker if the facts of one differ from the chief's.

        Args:
            name: What the facts are about.
            facts: Values by name, whose `str` is compared.
            point: Number of the comparison, if `name` is compared repeatedly.
            remedy: What to do if they differ.

        Raises:
            WorkersDifferError: If they differ.
            WorkerError: If a worker does not publish its own in time.
        """
        own = {key: str(value) for key, value in facts.items()}
        key = name if point is None else f"{name}/{point}"
        texts = self._store.exchange(key, json.dumps(own))
        found = [json.loads(text) for text in texts]
        differences = [
            difference
            for rank in range(1, len(found))
            for difference in self._difference(found[0], found[rank], rank)
        ]
        if not differences:
            return
        self._store.let_all_read(key)
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
        facts = {"number of gradients": str(len(gradients))}
        for index, gradient in enumerate(gradients):
            facts[f"gradient {index}"] = _spec(gradient)
        # Gradients of mixed precision are float32 as well.
        facts["dtype policy"] = keras.config.dtype_policy().name
        if facts not in self._lists:
            self._lists.append(facts)
            self.compare("models and steps", facts, next(self._points))

    def compare_steps(self, asked: int | None, batches: int | None) -> None:
        """Compares how many steps each epoch of a data set has.

        Keras ends an epoch after as many as it knows of, and the others would
        wait for this worker.

        Args:
            asked: `steps_per_epoch`, or `None`.
            batches: Batches of the data set, or `None` if not known.

        Raises:
            WorkerError: See `compare`.
        """
        self.compare(
            "models and steps",
            {"steps in an epoch": steps_of_epochs(asked, batches)},
            next(self._points),
            remedy="Give all workers as many batches, or a data set of no "
            "known length: `dataset.repeat()` with `steps_per_epoch`.",
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

        def compared() -> Any:
            value = (
                initial_value() if callable(initial_value) else initial_value
            )
            point = next(self._points)
            tensor = getattr(value, "wrapped_value", value)
            if isinstance(tensor, tf.Tensor):
                facts = {f"variable {point}": _spec(tensor)}
                self.compare("models and steps", facts, point)
            return value

        return compared

    def text_of_chief(self, text: str) -> str:
        """Returns on every worker what the chief has passed.

        Args:
            text: What this worker would have taken.

        Raises:
            WorkerError: See `Store.exchange`.
        """
        return self._store.exchange(f"decision/{next(self._points)}", text)[0]

    def _difference(
        self, chief: dict[str, str], other: dict[str, str], rank: int
    ) -> list[str]:
        """The first fact in which a worker differs from the chief, if any."""
        for key in [*chief, *(key for key in other if key not in chief)]:
            one, another = chief.get(key, "none"), other.get(key, "none")
            if one != another:
                name = self._cluster.name
                return [
                    f"{key}: {name(0)} has {one}, {name(rank)} has {another}"
                ]
        return []


def _spec(gradient: Any) -> str:
    dims = tf.TensorShape(gradient.shape).dims
    shape = "of unknown shape" if dims is None else [d.value for d in dims]
    kind = "rows of " if isinstance(gradient, tf.IndexedSlices) else ""
    return f"{kind}{gradient.dtype.name} {shape}"


def environment(devices: Sequence[str]) -> dict[str, Any]:
    """What must be the same on all workers before anything is traced.

    Args:
        devices: Names of the devices of this worker.
    """
    python = platform.python_version_tuple()
    return {
        "keras_allreduce": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": ".".join(python[:2]),
        "devices": len(devices),
        "device_type": tf.DeviceSpec.from_string(devices[0]).device_type,
    }
