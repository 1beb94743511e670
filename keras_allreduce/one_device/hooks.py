"""Lets the current step take part in methods of classes.

A step finds its optimizers, metrics and random generators wherever it likes,
so they cannot be replaced one by one. While any step runs, a few methods of
classes ask whether the calling thread runs a replica of one; in all other
threads, and once no step runs, they are unchanged. Methods of one object are
replaced by `shadowed`.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat.variables import PlainVariable
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Current, Replica

# Class, its method, and the method of the step that takes part in it.
_HOOKED = (
    (tf.GradientTape, "gradient", "gradient"),
    (keras.optimizers.Optimizer, "apply", "apply"),
    (keras.metrics.Mean, "update_state", "update_mean"),
    (keras.metrics.Sum, "update_state", "update_sum"),
    (keras.metrics.MeanMetricWrapper, "update_state", "update_function"),
    (keras.random.SeedGenerator, "next", "next_seed"),
    (tf.random.Generator, "skip", "skip"),
    (tf.distribute.ReplicaContext, "all_reduce", "all_reduce"),
    (tf.distribute.ReplicaContext, "merge_call", "merge_call"),
    (PlainVariable, "assign", "assign"),
    (PlainVariable, "assign_add", "assign"),
    (PlainVariable, "assign_sub", "assign"),
)

_lock = threading.Lock()
_running: list[Any] = []
_replaced: list[tuple[Any, str, Any, Any]] = []


@contextlib.contextmanager
def taking_part(
    step: Any, this: Replica = replica.NO_REPLICA
) -> Iterator[None]:
    """`step` is the current step of this thread in the block.

    Args:
        step: Has methods by the names above; each is called with the method
            that it takes part in, and with its arguments.
        this: The replica of the step that this thread runs.
    """
    with _lock:
        if not _running:
            _install()
        _running.append(step)
    try:
        with replica.entered(Current(step, this)):
            yield
    finally:
        with _lock:
            _running.remove(step)
            if not _running:
                _uninstall()


def hooked_methods() -> list[tuple[Any, str, str]]:
    """Class, its method, and the method of a step that takes part in it.

    An optimizer that overrides `apply` need not call Keras's, nor a metric that
    of the class above it, so their own take part too.
    """
    overriding = [
        (each, name, part)
        for base, name, part in (
            (keras.optimizers.Optimizer, "apply", "apply"),
            (keras.metrics.Metric, "result", "metric_result"),
        )
        for each in dict.fromkeys(_subclasses(base))
        if name in vars(each)
    ]
    return [*_HOOKED, *overriding]


def _subclasses(of: Any) -> Iterator[Any]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)


def _install() -> None:
    for owner, name, part in hooked_methods():
        own = vars(owner).get(name)
        hook = _hook(getattr(owner, name), part)
        _replaced.append((owner, name, own, hook))
        setattr(owner, name, hook)


def _uninstall() -> None:
    while _replaced:
        owner, name, own, hook = _replaced.pop()
        if vars(owner).get(name) is not hook:
            continue  # Somebody else has replaced it since.
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _hook(method: Any, part: str) -> Any:
    @functools.wraps(method)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A merge_call has no replica context, and is no replica's.
        step = replica.current_step()
        if step is None or tf.distribute.get_replica_context() is None:
            return method(self, *args, **kwargs)
        return getattr(step, part)(method, self, *args, **kwargs)

    # Plain Python, also inside a tf.function of the user's.
    return tf.autograph.experimental.do_not_convert(hooked)


_do_not_convert = tf.autograph.experimental.do_not_convert


@contextlib.contextmanager
def shadowed(owner: Any, methods: dict[str, Any]) -> Iterator[None]:
    """Replaces methods of one object inside the block."""
    # Past __setattr__, in which Keras tracks assignments.
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    # Plain Python, also inside a tf.function of the user's.
    own.update({name: _do_not_convert(methods[name]) for name in methods})
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
