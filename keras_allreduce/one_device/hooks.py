"""Lets the running step of a strategy take part in methods of classes.

A custom step finds its optimizers, metrics and random generators wherever it
likes, so they cannot be shadowed one by one as those of Keras's own step are.
While any step runs, a few methods of public classes ask whether the strategy
of the calling thread runs one; in all other threads, and once no step runs,
they are what they were.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

# Class, its method, and the method of the handler that takes part in it.
_HOOKED = (
    (tf.GradientTape, "gradient", "gradient"),
    (keras.optimizers.Optimizer, "apply", "apply"),
    (keras.metrics.Mean, "update_state", "update_mean"),
    (keras.metrics.Sum, "update_state", "update_sum"),
    (keras.random.SeedGenerator, "next", "next_seed"),
    (tf.distribute.ReplicaContext, "all_reduce", "all_reduce"),
)

_lock = threading.Lock()
_handlers: dict[int, list[Any]] = {}
_replaced: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def handled(strategy: tf.distribute.Strategy, handler: Any) -> Iterator[None]:
    """`handler` takes part in what replicas of `strategy` do in the block.

    Args:
        strategy: The strategy.
        handler: Has methods by the names above; each is called with the
            method that it takes part in, and with its arguments.
    """
    key = id(strategy.extended)
    with _lock:
        if not _handlers:
            _install()
        _handlers.setdefault(key, []).append(handler)
    try:
        yield
    finally:
        with _lock:
            _handlers[key].pop()
            if not _handlers[key]:
                del _handlers[key]
            if not _handlers:
                _uninstall()


def _install() -> None:
    for owner, name, part in _HOOKED:
        own = vars(owner).get(name)
        _replaced.append((owner, name, own))
        setattr(owner, name, _hook(getattr(owner, name), part))


def _uninstall() -> None:
    while _replaced:
        owner, name, own = _replaced.pop()
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _hook(method: Any, part: str) -> Any:
    @functools.wraps(method)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler = _current()
        if handler is None:
            return method(self, *args, **kwargs)
        return getattr(handler, part)(method, self, *args, **kwargs)

    # Plain Python, also inside a tf.function of the user's.
    return tf.autograph.experimental.do_not_convert(hooked)


def _current() -> Any:
    """The handler of the strategy that this thread runs a replica of."""
    if tf.distribute.get_replica_context() is None:
        return None
    handlers = _handlers.get(id(tf.distribute.get_strategy().extended))
    return handlers[-1] if handlers else None
