"""The door through which Keras tells this package about its calls.

Keras tells a strategy neither which call distributes a data set, nor when an
epoch begins, nor whose step it runs, nor why it reads a batch or its metrics.
So a few methods of Keras are wrapped, once, when the first strategy is made.
For models that are not under a strategy of ours they stay the same.

    fit, evaluate, predict               a `KerasCall` begins and ends
    CallbackList.on_epoch_begin          it has an epoch
    TFEpochIterator.__init__             it has an iterator over its epochs
    get_metrics_result                   the metrics are read together
    _maybe_symbolic_build                a model is built: see below
    make_train_function, and of test     the function that it makes says, while
      and predict                          it runs, whose step it runs, and is
                                           optimized for CPUs (`functions`)
    Variable._initialize and             a variable is made, by which
      _initialize_with_initializer         initializer

Only under a strategy does Keras take a first batch before the first step, and
call the model, its metrics and its losses on its shapes, to make all
variables. On one device the first step makes them. A custom `train_step` need
not call the model, nor take the batch apart as Keras does, and on one device it
trains. So this module does it instead: data is read only if nothing else
tells its shapes, and a failure is left to the first step.

Keras puts `jit_compile` on the function around `strategy.run`, so that one XLA
program would have the devices of all replicas, which XLA refuses. Under a
strategy that compiles each replica (`strategy.compiles_replicas`), Keras's
functions are made as with `jit_compile=False`, and `model.jit_compile` keeps
the user's value.

`KERAS_ALLREDUCE_DOOR=0` leaves Keras as it is. Without the door, or where Keras
is not as it is known, a warning names the consequence.
"""

import contextlib
import functools
import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_allreduce.compat import functions, keras_calls
from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.environment import DOOR

_CUSTOM_LOOP = (
    "a step that is no method of its model is taken for a custom loop"
)

_state = {"installed": False}
_wrapped: set[str] = set()
_warned: set[str] = set()


def install() -> None:
    """Wraps the methods, once; warns of those that Keras does not have."""
    if _state["installed"]:
        return
    _state["installed"] = True
    if os.environ.get(DOOR) == "0":
        _warn(
            f"{DOOR} is not 0",
            f"{DOOR}=0",
            "the first batch of a Python generator may be lost, a first batch "
            "that is not as large on all replicas fails, as does `predict` of "
            "fewer samples than replicas, a step that is no method of its "
            "model is taken for a custom loop, `jit_compile=True` is refused, "
            "and workers do not compare their calls of Keras",
            f"Unset {DOOR}.",
        )
        return
    for owner, name, wrap, consequence in _doors():
        stock = None if owner is None else getattr(owner, name, None)
        if _has_arguments(stock, wrap):
            setattr(owner, name, wrap(stock))
            _wrapped.add(name)
        else:
            _warn_of_keras(f"`{name}`", consequence)


def _doors() -> Iterator[tuple[Any, str, Callable[..., Any], str]]:
    """Owner and name of each method, its wrapper, its purpose."""
    unknown = "workers do not compare their calls of Keras"
    for name in ("fit", "evaluate", "predict"):
        yield keras.Model, name, functools.partial(_call, name), unknown
    callbacks = keras.callbacks.CallbackList
    yield callbacks, "on_epoch_begin", _on_epoch_begin, unknown
    iterator = keras_calls.epoch_iterator_class()
    made = functools.partial(_within, keras_calls.making)
    yield iterator, "__init__", made, unknown
    slow = "workers sum their metrics one by one"
    yield keras.Model, "get_metrics_result", _metrics_read, slow
    lost = "the first batch of a Python generator may be lost"
    yield keras.Model, "_maybe_symbolic_build", _build, lost
    for step, loss in (
        *((each, _CUSTOM_LOOP) for each in keras_compat.STEPS),
        (keras_compat.PREDICT, "fewer samples than replicas fail in `predict`"),
    ):
        maker = functools.partial(_function_made, step, loss)
        yield keras.Model, keras_compat.maker_of(step), maker, loss
    nameless = "errors about variables do not name them"
    yield keras.Variable, "_initialize", _value_made, nameless
    sent = "variables of zeros and ones cross between workers as well"
    name = "_initialize_with_initializer"
    yield keras.Variable, name, _initialized, sent


def _has_arguments(stock: Any, wrap: Callable[..., Any]) -> bool:
    """Whether a method is there, with the arguments that its wrapper reads."""
    if stock is None:
        return False
    known = inspect.signature(stock).parameters
    return all(each in known for each in _ARGUMENTS.get(wrap, ()))


def _is_ours(model: Any) -> bool:
    return hasattr(model.distribute_strategy, "prepare_model")


def _call(kind: str, stock: Any) -> Any:
    @functools.wraps(stock)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(model):
            return stock(model, *args, **kwargs)
        with keras_calls.during(kind, model) as seen:
            result = stock(model, *args, **kwargs)
        if kind == "fit" and not seen:
            _warn_of_keras(
                "an iterator over the epochs of `fit`",
                "workers do not compare their calls of Keras",
            )
        return result

    return call


def _on_epoch_begin(stock: Any) -> Any:
    @functools.wraps(stock)
    def on_epoch_begin(
        callbacks: Any, epoch: Any, *args: Any, **kw: Any
    ) -> Any:
        keras_calls.begin_epoch(callbacks, epoch)
        return stock(callbacks, epoch, *args, **kw)

    return on_epoch_begin


def _within(block: Callable[[Any], Any], stock: Any) -> Any:
    """A method that runs in a block, which gets the object of the method."""

    @functools.wraps(stock)
    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with block(owner):
            return stock(owner, *args, **kwargs)

    return method


def _metrics_read(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_metrics_result(model: Any) -> Any:
        if not _is_ours(model):
            return stock(model)
        with keras_calls.reading_metrics(model):
            return stock(model)

    return get_metrics_result


def _build(stock: Any) -> Any:
    @functools.wraps(stock)
    def build(model: Any, iterator: Any = None, data_batch: Any = None) -> Any:
        # Keras does nothing for a model that was made outside of a scope.
        strategy = getattr(model, "_distribute_strategy", None)
        if not hasattr(strategy, "prepare_model"):
            return stock(model, iterator=iterator, data_batch=data_batch)
        return _symbolic_build(model, strategy, iterator, data_batch)

    return build


def _symbolic_build(
    model: keras.Model, strategy: Any, epoch_iterator: Any, batch: Any
) -> None:
    """Makes the variables of a model that its first step needs.

    Args:
        model: The model.
        strategy: Its strategy, one of ours.
        epoch_iterator: Keras's iterator over the data; `None` where it has a
            batch.
        batch: The batch then.
    """
    samples = keras_calls.first_samples(
        epoch_iterator, strategy.samples_to_measure
    )
    if epoch_iterator is not None:
        dataset = epoch_iterator._get_iterator()
        iteration = getattr(dataset, "iteration", None)
        if iteration is None:  # TensorFlow's own; see `input/dataset.py`.
            batch = next(iter(dataset), ())
        else:
            # A custom step is measured on samples, which arrays have at hand.
            is_read = samples is None and keras_compat.is_custom_step(
                model, "train_step"
            )
            batch = iteration.first_batch(
                shapes_only=_is_built(model) and not is_read
            )
        batch = keras.tree.map_structure(
            lambda leaf: strategy.experimental_local_results(leaf)[0], batch
        )
    with strategy.scope():
        strategy.prepare_model(model, batch if samples is None else samples)
        try:
            model._symbolic_build(data_batch=batch)
        except Exception as error:
            # It fails on one device too if it is the program's fault.
            if _is_our_own(error):
                raise


def _is_built(model: Any) -> bool:
    try:
        return all(
            part is None or part.built
            for part in (
                *model._flatten_layers(),
                model._compile_metrics,
                model._compile_loss,
            )
        )
    except AttributeError:
        return False


def _is_our_own(error: BaseException | None) -> bool:
    """Whether this package has raised an error, or one that it follows."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if module.startswith("keras_allreduce.") and module != __name__:
            return True
        error = error.__cause__ or error.__context__
    return False


def _function_made(step: str, consequence: str, stock: Any) -> Any:
    name = keras_compat.function_of(step)

    @functools.wraps(stock)
    def make(model: Any, *args: Any, **kwargs: Any) -> Any:
        if step == "train_step":
            _check_optimizer(model)
        before = getattr(model, name, None)
        with _not_compiled_around(model):
            result = stock(model, *args, **kwargs)
        function = getattr(model, name, None)
        if not _is_ours(model) or function is before:
            return result
        if callable(function):
            setattr(model, name, _saying(model, step, function))
        else:
            _warn_of_keras(f"`{name}` of a model", consequence)
        return result

    return make


def _check_optimizer(model: Any) -> None:
    """Raises if a strategy made the optimizer of a model that is not its own.

    The optimizer would make its variables outside of the scope.
    """
    if _is_ours(model):
        return  # The step says it.
    optimizer = getattr(model, "optimizer", None)
    for variable in getattr(optimizer, "variables", ()):
        value = getattr(variable, "value", None)
        strategy = getattr(value, "distribute_strategy", None)
        refuse = getattr(strategy, "refuse_model_made_outside", None)
        if refuse is not None:
            refuse(model)


@contextlib.contextmanager
def _not_compiled_around(model: Any) -> Iterator[None]:
    """Keras compiles nothing around the replicas in the block."""
    if not compiles_replicas(model):
        yield
        return
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = True


def compiles_replicas(model: Any) -> bool:
    """Whether XLA is to compile the replicas of a model."""
    strategy = getattr(model, "distribute_strategy", None)
    return (
        getattr(strategy, "compiles_replicas", False)
        and makes_functions()
        and getattr(model, "jit_compile", False) is True
        and not model.run_eagerly
    )


def makes_functions() -> bool:
    """Whether the functions of all steps are made behind the door."""
    steps = (*keras_compat.STEPS, keras_compat.PREDICT)
    return all(keras_compat.maker_of(step) in _wrapped for step in steps)


def _saying(model: Any, step: str, function: Any) -> Any:
    """`function`, which says whose step it runs, and is optimized for it."""
    devices = model.distribute_strategy.extended.worker_devices
    optimizing = (
        functions.brief
        if functions.is_brief_on(devices)
        else contextlib.nullcontext
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        with keras_calls.running_step(model, step), optimizing():
            return function(*args, **kwargs)

    return run


def _value_made(stock: Any) -> Any:
    @functools.wraps(stock)
    def initialize(variable: Any, value: Any) -> Any:
        with keras_calls.making_variable(variable, value):
            return stock(variable, value)

    return initialize


def _initialized(stock: Any) -> Any:
    @functools.wraps(stock)
    def initialize(variable: Any, initializer: Any) -> Any:
        with keras_calls.initializing(initializer):
            return stock(variable, initializer)

    return initialize


_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    _on_epoch_begin: ("epoch",),
    _build: ("iterator", "data_batch"),
    _value_made: ("value",),
    _initialized: ("initializer",),
}


def _warn_of_keras(missing: str, consequence: str) -> None:
    _warn(
        f"{missing} in Keras",
        f"Keras {keras.__version__}, which has none that is known",
        consequence,
        "Use a version of Keras that keras_allreduce was tested with.",
    )


def _warn(rule: str, received: str, consequence: str, remedy: str) -> None:
    if rule not in _warned:
        _warned.add(rule)
        warnings.warn(
            f"keras_allreduce expects {rule}. Received: {received}, so "
            f"{consequence}. {remedy}",
            stacklevel=4,
        )
