"""Assumptions about Keras's trainer, layers and losses, one function each.

`keras_optimizers.py` has those about optimizers. Each has a test of its name in
`tests/compat/test_keras_assumptions.py`.
"""

from typing import Any

import keras
import tensorflow as tf

# Trainer: steps and logs -----------------------------------------------------


def is_keras_method(model: Any, name: str) -> bool:
    """Whether the class of `model` leaves a method as Keras has it."""
    return getattr(type(model), name) is getattr(keras.Model, name)


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
        if not type(metric).update_state.__module__.startswith("keras.")
    ]


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
    """All layers of a model, at any depth, and the model itself.

    The public `layers` lists only those at the top.
    """
    return list(model._flatten_layers())


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
        and type(layer).call.__module__.startswith("keras.")
        and not isinstance(layer, keras.Model | keras.layers.Lambda)
    )


def has_custom_forward_pass(model: Any) -> bool:
    """Whether code that is not that of Keras's layers computes the outputs.

    That is a layer or a model with a `call` of its own, a `Lambda`, or ops
    between the layers of a functional model.
    """
    every = layers(model)
    return any(
        not type(layer).call.__module__.startswith("keras.")
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


def keeps_own_state(model: Any) -> bool:
    """Whether a layer that is not Keras's has weights that no gradient is of.

    Keras has no public name for those that are a layer's own.
    """
    return any(
        getattr(layer, "_non_trainable_variables", ())
        or any(isinstance(each, tf.Variable) for each in vars(layer).values())
        for layer in layers(model)
        if not type(layer).__module__.startswith("keras.")
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
