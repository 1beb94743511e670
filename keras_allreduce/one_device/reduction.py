"""How values of a batch follow from those of its parts: Keras's `reduction`.

The target of a custom step does not say whether it is a mean or a sum.
But its gradients do. With g(B) on a batch B of two halves B1 and B2, and
m = (g(B1) + g(B2)) / 2:

    a mean over samples                       g(B) = 1 m
    a sum over samples, a mean over another
    constant number of samples                g(B) = 2 m
    a mean over what counts, n(B) of it       n(B) g(B) = n(B1) g(B1) + ...
    a loss that compares samples              none of these

All replicas ask for gradients, updates and metrics in one order, and so does
the step where it is measured: numbers in that order are the keys by which a
replica finds the `Reduction` of a value.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import graphs
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat.variables import is_made_outside_of_scope
from keras_allreduce.one_device import replica

MEAN = "mean"
SUM = "sum"
RATIO = "ratio"
FIRST = "first"
MAX = "max"
MIN = "min"

UNDECIDED = "undecided"
WEIGHTED = "weighted mean"
COMPARES = "compares samples"
STATE = "state"

Key = tuple[Any, ...]

# States: variables of the strategy, and those made outside of its scope.
STATES = ("state", "outside")

# Shown values: inputs of metrics, logs, and logs that are integers.
SHOWN = ("metric", "log", "count")

OF_OP = {"Mean": MEAN, "Sum": SUM, "Max": MAX, "Min": MIN}
"""The kind of a value that ends in an op."""


@dataclass(frozen=True)
class Reduction:
    """How a value of a batch follows from those of its parts.

    Attributes:
        kind: How those of the replicas are combined: `"mean"` or `"sum"` over
            samples; `"ratio"`, the mean over the count in the denominator of
            the value; `"max"`, `"min"`, the extreme of all; `"first"`, that
            of the first replica.
        doubt: Why that may differ from one device: it is `"undecided"`, a
            `"weighted mean"`, it `"compares samples"`, or is a `"state"` that
            is neither a mean nor a sum. Empty if it does not.
        decay: Share of its value that a variable keeps in a step, before
            something is added to it.
        ratio: g(B) / m, by least squares; 1 for a mean, 2 for a sum.
        residual: The rest of g(B) then, relative to it.
    """

    kind: str = MEAN
    doubt: str = ""
    decay: float = 1.0
    ratio: float = 1.0
    residual: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether the result is that of one device."""
        return not self.doubt

    @property
    def adds_up(self) -> bool:
        """Whether replicas that share a variable add what one device adds."""
        return self.is_exact and self.kind == SUM and self.decay == 1.0


@dataclass(frozen=True)
class Reductions:
    """The reductions of all values of a step.

    Attributes:
        found: That of each gradient, loss, value of a metric and log.
        failure: Why nothing was measured; empty if it was.
        losses: That of all gradients and losses, if the user says it.
    """

    found: Mapping[Key, Reduction] = field(default_factory=dict)
    failure: str = ""
    losses: Reduction | None = None

    @classmethod
    def given(cls, *, is_sum: bool) -> "Reductions":
        """All losses are sums over samples, or all are means."""
        return cls(losses=Reduction(SUM if is_sum else MEAN))

    def to_json(self) -> str:
        """For `from_json`, on another worker."""
        found = [(key, asdict(value)) for key, value in self.found.items()]
        return json.dumps([found, self.failure])

    @classmethod
    def from_json(cls, text: str) -> "Reductions":
        """What `to_json` was called on."""
        found, failure = json.loads(text)
        return cls(
            {tuple(key): Reduction(**value) for key, value in found},
            failure,
        )

    def is_sum(self, *key: Any) -> bool:
        """Whether a value is a sum over samples; if not known, a mean."""
        return self.of(*key).kind == SUM

    def of_inputs(self, target: Any, *key: Any) -> Reduction | None:
        """That of a gradient by inputs; `None` if it is right as it is.

        Args:
            target: The differentiated value.
            *key: The key of the gradient.
        """
        found = self.found.get(key)
        if self.losses is not None and len(getattr(target, "shape", ())) == 0:
            found = self.losses
        return None if found is None or found.kind == SUM else found

    def of(self, *key: Any) -> Reduction:
        """The reduction of a value; a mean if it is not known.

        A log of which there is a doubt, which is said, is a mean too.
        """
        if self.losses is not None and key[0] not in (*SHOWN, "state"):
            return self.losses
        found = self.found.get(key, Reduction())
        if key[0] in SHOWN and not found.is_exact:
            return Reduction()
        return found


def gradient_key(tape: tf.GradientTape, sources: Any) -> Key | None:
    """The key of a gradient.

    `None` if it is one of variables that is itself differentiated, or one of
    each sample: `tf.GradientTape.jacobian`, `tf.vectorized_map`.
    """
    if graphs.is_in_vectorized_map():
        return None
    this = replica.current()
    if not keras_compat.are_variables(sources):
        return "inputs", this.next_call("inputs")
    if is_differentiated(tape):
        return None
    if graphs.of_thread() is not this.graph:
        raise RuntimeError(
            "A gradient of variables cannot be summed over the replicas "
            "inside a `tf.cond`, a `tf.while_loop` or a `tf.function` within "
            "a step. Received: `tape.gradient` called there. Take the "
            "gradients outside and apply them where they count: `gradients = "
            "[g * tf.cast(condition, g.dtype) for g in gradients]`, or "
            "`tf.cond(condition, lambda: optimizer.apply(gradients, "
            "variables), lambda: None)`; write loops with Python's `range`."
        )
    return "gradient", this.next_call("gradient")


def is_differentiated(tape: tf.GradientTape) -> bool:
    """Whether a gradient that a tape is asked for is differentiated too."""
    return graphs.is_recorded_by_another(tape)


def denominator_key(key: Key) -> Key:
    """The key of the denominator of a value."""
    return "denominator", *key


def update_key() -> Key:
    """The key of an update by an optimizer."""
    return "apply", replica.current().next_call("apply")


def metric_key(updated: Any) -> Key:
    """The key of a value that goes into a metric."""
    return "metric", updated.name, replica.current().next_call(updated.name)


def log_key(path: Key, dtype: tf.DType) -> Key:
    """The key of a log; an integer counts something.

    Args:
        path: Where it is in the logs.
        dtype: Its dtype.
    """
    return "count" if dtype.is_integer else "log", *path


def state_key(variable: Any) -> Key:
    """The key of a variable that a replica assigns on its own."""
    return "state", variable.name, replica.current().next_call("state")


def outside_key(variable: Any) -> Key | None:
    """The key of a variable that no strategy has made.

    `None` if it is the part of a replica of one that a strategy has made, or
    has a key already.
    """
    this = replica.current()
    if (
        this is replica.NO_REPLICA
        or id(variable) in this.assigned
        or replica.updates_locally()
        or not is_made_outside_of_scope(variable)
    ):
        return None
    this.assigned.add(id(variable))
    return "outside", variable.name, this.next_call("outside")


def have_state_summed(metric: keras.metrics.Metric) -> None:
    """The replica adds its share of a batch to the state of a metric."""
    this = replica.current()
    if this is not replica.NO_REPLICA:
        this.assigned.update(map(keras_compat.identity_of, metric.variables))
