"""The door by which `compile(jit_compile=True)` reaches the replicas.

Keras puts `jit_compile` on the function around `strategy.run`, so that one XLA
program would have the devices of all replicas, which XLA refuses. Under a
strategy that compiles each replica (`strategy.compiles_replicas`),
Keras's functions are made as with `jit_compile=False`, and `model.jit_compile`
keeps the user's value.

Keras makes them in three methods and calls nothing of a strategy's there, so
these methods of `keras.Model` are wrapped, once, when the first strategy is
made. They are unchanged for all other models. `close` undoes it; then, or in
a Keras without these methods, `is_open` is false.
"""

import functools
from typing import Any

import keras

_MAKERS = ("make_train_function", "make_test_function", "make_predict_function")

# The own methods of `keras.Model` that were replaced; `None` if inherited.
_replaced: dict[str, Any] = {}


def open_() -> None:
    """Wraps the methods that make functions of steps, once."""
    if is_open() or not all(hasattr(keras.Model, name) for name in _MAKERS):
        return
    for name in _MAKERS:
        _replaced[name] = vars(keras.Model).get(name)
        setattr(keras.Model, name, _wrapped(getattr(keras.Model, name)))


def close() -> None:
    """Makes Keras as it was."""
    for name, own in _replaced.items():
        if own is None:
            delattr(keras.Model, name)
        else:
            setattr(keras.Model, name, own)
    _replaced.clear()


def is_open() -> bool:
    """Whether Keras compiles nothing around the replicas of a strategy."""
    return bool(_replaced)


def compiles_replicas(model: Any) -> bool:
    """Whether XLA is to compile the replicas of a model."""
    strategy = getattr(model, "distribute_strategy", None)
    return (
        getattr(strategy, "compiles_replicas", False)
        and is_open()
        and getattr(model, "jit_compile", False) is True
        and not model.run_eagerly
    )


def _wrapped(make: Any) -> Any:
    @functools.wraps(make)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not compiles_replicas(self):
            return make(self, *args, **kwargs)
        self.jit_compile = False
        try:
            return make(self, *args, **kwargs)
        finally:
            self.jit_compile = True

    return wrapped
