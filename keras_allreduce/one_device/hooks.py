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
# Handlers of each strategy, the innermost last. Never changed in place: other
# threads read them without the lock.
_handlers: dict[int, tuple[Any, ...]] = {}
_replaced: list[tuple[Any, str, Any, Any]] = []


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
        _handlers[key] = (*_handlers.get(key, ()), handler)
    try:
        yield
    finally:
        with _lock:
            *others, _ = _handlers[key]
            if others:
                _handlers[key] = tuple(others)
            else:
                del _handlers[key]
            if not _handlers:
                _uninstall()


def hooked_methods() -> list[tuple[Any, str, str]]:
    """Class, its method, and the method of a handler that takes part in it.

    An optimizer that overrides `apply` need not call Keras's, so its own takes
    part too.
    """
    optimizers = dict.fromkeys(_subclasses(keras.optimizers.Optimizer))
    overriding = [
        (optimizer, "apply", "apply")
        for optimizer in optimizers
        if "apply" in vars(optimizer)
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
    handlers = _handlers.get(id(tf.distribute.get_strategy().extended), ())
    return handlers[-1] if handlers else None
