"""Assumptions about Keras's trainer, layers and optimizers, one function each.

Each has a test of its name in `tests/compat/test_keras_assumptions.py`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras_calls
from keras_allreduce.compat.keras_config import is_of_keras

# Trainer: steps and logs -----------------------------------------------------

STEPS = ("train_step", "test_step")
PREDICT = "predict_step"


def is_keras_method(model: Any, name: str) -> bool:
    """Whether the class of `model` leaves a method as Keras has it."""
    return getattr(type(model), name) is getattr(keras.Model, name)


@functools.cache
def attributes_of_any_model() -> frozenset[str]:
    """Names of the attributes that Keras gives every model."""
    return frozenset(vars(keras.Model(name="any")))


def is_custom_step(model: Any, name: str) -> bool:
    """Whether a model computes its loss, or a step, as Keras does not."""
    return not all(
        is_keras_method(model, method) for method in (name, "compute_loss")
    )


def custom_metrics(model: Any) -> list[Any]:
    """Metrics of a model that gather their state in code that is not Keras's.

    `model.metrics` has those of `compile` in one metric that holds them.
    """
    compiled = getattr(model, "_compile_metrics", None)
    metrics = [*model.metrics, *(compiled.metrics if compiled else ())]
    return [
        metric
        for metric in metrics
        if not is_of_keras(type(metric).update_state)
    ]


def function_of(step: str) -> str:
    """The attribute in which a model keeps the function that runs a step."""
    return step.replace("_step", "_function")


def maker_of(step: str) -> str:
    """The method of a model that makes that function."""
    return f"make_{function_of(step)}"


def step_of(fn: Callable[..., Any]) -> tuple[keras.Model | None, str]:
    """The model whose step `strategy.run` is given, and the name of the step.

    The function that runs steps has said so (`keras_door.py`), whatever wraps
    the step. Without it, a method of a model that is its step is known.

    Returns:
        The model and one of `STEPS` or `PREDICT`, or `None` and an empty
        string.
    """
    return keras_calls.current_step() or _bound_step(fn)


def _bound_step(fn: Any) -> tuple[keras.Model | None, str]:
    """The model and the step of a bound method, maybe wrapped."""
    while fn is not None:
        model = getattr(fn, "__self__", None)
        # TensorFlow binds its functions to an object that refers to it.
        model = getattr(model, "target", model)
        if isinstance(model, keras.Model):
            for name in STEPS:
                if name == getattr(fn, "__name__", "") or fn == getattr(
                    model, name
                ):
                    return model, name
        fn = getattr(fn, "__wrapped__", None)
    return None, ""


def what_a_step_depends_on(model: keras.Model, step: str) -> list[Any]:
    """The objects that Keras makes anew when a step may have changed.

    They are the function that runs it, which `make_train_function(force=True)`
    makes too, and the arguments of `compile`.
    """
    function = getattr(model, function_of(step), None)
    optimizer = getattr(model, "optimizer", None)
    return [each for each in (function, optimizer) if each is not None]


def plain(fn: Any, model: keras.Model, name: str) -> Any:
    """A step of a model, or the plain method that replaces a `tf.function`."""
    step = getattr(type(model), name, None)
    if isinstance(step, tf.types.experimental.PolymorphicFunction):
        return getattr(model, name)
    return fn


def inlined_functions(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """The methods of a model that are `tf.function`s, as plain methods.

    A step runs in a `tf.function` of Keras anyway, and replicas cannot sum
    anything inside another one.
    """
    for owner in reversed(type(model).__mro__):
        for name, method in vars(owner).items():
            if isinstance(method, tf.types.experimental.PolymorphicFunction):
                plain = method.python_function
                # Without source code as it is, without autograph.
                with contextlib.suppress(OSError, ValueError, TypeError):
                    plain = tf.autograph.to_graph(plain)
                yield name, partial(plain, model)


# Trainer: its questions to a strategy -----------------------------------------


def are_scalar_logs(reduce_op: Any, value: Any, axis: Any) -> bool:
    """Whether a reduction is that of the logs of a step.

    Keras takes the mean of scalars along axis 0, which they do not have. Those
    of a step that runs eagerly are Python's numbers in Keras 3.10.
    """
    return (
        _is_mean(reduce_op)
        and axis == 0
        and all(
            tf.TensorShape(getattr(part, "shape", ())).rank == 0
            for part in getattr(value, "values", (value,))
        )
    )


def _is_mean(reduce_op: Any) -> bool:
    return str(getattr(reduce_op, "value", reduce_op)).upper() == "MEAN"


# Layers ----------------------------------------------------------------------


def layers(model: Any) -> list[Any]:
    """The model, and then all its layers at any depth, in a fixed order.

    The public `layers` lists only those at the top.
    """
    return list(model._flatten_layers())


def stateful_layers(model: Any) -> list[Any]:
    """Layers that keep a state for each row of a batch, such as RNNs."""
    return [each for each in layers(model) if getattr(each, "stateful", False)]


def innermost_layer(model: Any, op_name: str) -> Any:
    """The layer of a model in whose `call` an op was traced, or `None`.

    Keras opens a name scope of the name of a layer, to which TensorFlow adds
    a number if there is one already.
    """
    by_name = {layer.name: layer for layer in layers(model)}
    for scope in reversed(op_name.split("/")[:-1]):
        for name in (scope, scope.rpartition("_")[0]):
            if name in by_name:
                return by_name[name]
    return None


def is_keras_layer(layer: Any) -> bool:
    """Whether Keras's code computes a layer, and no other layers or ops.

    A `Lambda`, and a model, run code of the user.
    """
    return (
        layer is not None
        and is_of_keras(type(layer).call)
        and not isinstance(layer, keras.Model | keras.layers.Lambda)
    )


def has_custom_forward_pass(model: Any) -> bool:
    """Whether code that is not that of Keras's layers computes the outputs.

    That is a layer or a model with a `call` of its own, a `Lambda`, or ops
    between the layers of a functional model.
    """
    every = layers(model)
    return any(
        not is_of_keras(type(layer).call)
        or isinstance(layer, keras.layers.Lambda)
        for layer in every
    ) or any(
        not isinstance(operation, keras.Layer)
        for layer in every
        for operation in getattr(layer, "operations", ())
    )


def is_synchronized(layer: Any) -> bool:
    """Whether a layer takes its statistics over all replicas."""
    return bool(getattr(layer, "synchronized", False))


def batch_statistics_layers(model: Any) -> list[Any]:
    """Layers that normalize by the statistics of the batch in training."""
    return [
        layer
        for layer in layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def moving_statistics(model: Any) -> list[Any]:
    """Variables of the layers that only `BatchNormalization` assigns."""
    return [
        variable
        for layer in batch_statistics_layers(model)
        if layer.built
        for variable in (layer.moving_mean, layer.moving_variance)
    ]


def keeps_own_state(model: Any) -> bool:
    """Whether a layer that is not Keras's has weights that no gradient is of.

    Keras has no public name for those that are a layer's own.
    """
    return any(
        getattr(layer, "_non_trainable_variables", ())
        or any(isinstance(each, tf.Variable) for each in vars(layer).values())
        for layer in layers(model)
        if not is_of_keras(layer)
    )


# Variables -------------------------------------------------------------------


def are_variables(sources: Any) -> bool:
    """Whether all that is differentiated against are variables of replicas.

    Keras's variables are not `tf.Variable`s; they hold one in `value`.
    """
    flat = tf.nest.flatten(sources)
    return bool(flat) and all(
        isinstance(
            each,
            keras.Variable | tf.Variable | tf.distribute.DistributedValues,
        )
        for each in flat
    )


def identity_of(variable: Any) -> int:
    """The same for a variable of Keras and the one of TensorFlow in it."""
    # Of a variable of TensorFlow, `value` is a method, made anew when asked.
    is_kerass = isinstance(variable, keras.Variable)
    return id(variable.value if is_kerass else variable)


def all_variables(model: Any) -> list[Any]:
    """The variables of a model and of its optimizer."""
    optimizer = getattr(model, "optimizer", None)
    of_optimizer = getattr(optimizer, "variables", ())
    return [*model.variables, *of_optimizer]


def computes_in_half_precision(model: Any) -> bool:
    """Whether a layer of a model computes in 16 bits."""
    return any(
        str(getattr(layer, "compute_dtype", "")) in ("float16", "bfloat16")
        for layer in layers(model)
    )


# Optimizers ------------------------------------------------------------------


def optimizers_of(model: keras.Model) -> list[Any]:
    """All optimizers that a step of the model may use.

    Keras's own step uses `model.optimizer`; a custom one finds the others in
    attributes of the model.
    """
    candidates = [getattr(model, "optimizer", None), *vars(model).values()]
    found: list[Any] = []
    for candidate in candidates:
        if isinstance(candidate, keras.optimizers.Optimizer) and not any(
            candidate is other for other in found
        ):
            found.append(candidate)
    return found


def inner_optimizer(optimizer: Any) -> Any | None:
    """The optimizer that a `LossScaleOptimizer` applies, `None` for others.

    The outer one checks that all gradients are finite, and only then calls
    `apply` of the inner one.
    """
    return getattr(optimizer, "inner_optimizer", None)


def has_slots(optimizer: Any) -> bool:
    """Whether an optimizer has variables of its own for those it updates.

    Each has `iterations` and, unless it has a schedule, `learning_rate`. All
    that an update of Keras's own optimizers writes is in `optimizer.variables`,
    or given to it.
    """
    return len(optimizer.variables) > 2


def accumulates(optimizer: Any) -> bool:
    """Whether an optimizer adds up the gradients of several steps."""
    inner = inner_optimizer(optimizer) or optimizer
    return bool(getattr(inner, "gradient_accumulation_steps", None))


def gradient_accumulators(
    optimizer: Any, variables: Sequence[Any]
) -> list[Any] | None:
    """The variables in which `optimizer` adds up gradients of `variables`.

    Keras has no public name for them. `None` if it does not accumulate, or
    has not made them yet.
    """
    if not getattr(optimizer, "gradient_accumulation_steps", None):
        return None
    if not optimizer.built:
        return None
    accumulators = [
        optimizer._accumulated_gradients[optimizer._get_variable_index(v)]
        for v in variables
    ]
    return None if any(a is None for a in accumulators) else accumulators


def all_accumulators(optimizer: Any) -> list[Any]:
    """All variables in which `optimizer` adds up gradients, if it does."""
    inner = inner_optimizer(optimizer) or optimizer
    found = getattr(inner, "_accumulated_gradients", None) or ()
    return [each for each in found if each is not None]


def iterations(optimizer: Any) -> Any:
    """Variable that counts the gradients `optimizer` was given.

    The public `iterations` counts updates, which are fewer if it accumulates.
    """
    return optimizer._iterations.value


def takes_gradient_as_value(variable: Any) -> bool:
    """Whether Keras assigns a variable its gradient (scales of float8).

    Keras takes those out of the update, so nothing is summed over replicas.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))
