"""Finds out which gradients a model will have, without a training step.

Whether a gradient is dense, rows (`tf.IndexedSlices`) or none at all depends
on every op between the variable and the loss, not on the kind of its layer. So
the forward pass is traced, and differentiated, as the train step will be;
nothing runs. The loss is not needed: it depends on the same ops as the outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat.keras import takes_gradient_as_value
from keras_allreduce.reduce.sparse import RowsSpec


@dataclass(frozen=True)
class ModelGradients:
    """The gradients that the step of a model will sum.

    Attributes:
        paths: Path of the variable of each gradient, in variable order.
        specs: Its `tf.TensorSpec`, or `RowsSpec` if it is sparse.
        without: Paths of trainable variables that have no gradient.
        every: They are sent once in so many steps.
        traced: Whether this was found by tracing. If not, each variable was
            taken to have a dense gradient.
        callable: Whether the model has a `call` that could be traced.
    """

    paths: tuple[str, ...]
    specs: tuple[tf.TensorSpec | RowsSpec, ...]
    without: tuple[str, ...] = ()
    every: int = 1
    traced: bool = True
    callable: bool = True


def gradients_of(
    model: keras.Model, strategy: Any, x: Any = None
) -> ModelGradients:
    """Finds the gradients that a step of `model` will sum.

    Args:
        model: A model that is built.
        strategy: Its strategy.
        x: Inputs, as the model is called with: arrays, tensors or
            `tf.TensorSpec`s. `None`: as the model itself knows them.

    Returns:
        Its gradients. They are only supposed to be dense if the model does
        not know its inputs and none are given.

    Raises:
        ValueError: If the model is not built.
    """
    variables = _variables_of(model)
    inputs = x
    if inputs is None or not _has_call(model):
        inputs = _inputs_of(model)
    if inputs is None:
        found: list[Any] = [_dense(variable) for variable in variables]
    else:
        found = _trace(model, strategy, variables, inputs)
    optimizer = getattr(model, "optimizer", None)
    every = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    if every > 1:
        # Accumulated gradients are dense.
        found = [spec and _dense(spec) for spec in found]
    pairs = list(zip(variables, found, strict=True))
    return ModelGradients(
        tuple(variable.path for variable, spec in pairs if spec is not None),
        tuple(spec for _, spec in pairs if spec is not None),
        tuple(variable.path for variable, spec in pairs if spec is None),
        every,
        inputs is not None,
        _has_call(model),
    )


def _variables_of(model: keras.Model) -> list[Any]:
    """The variables of a built model that Keras updates by a gradient."""
    if not _is_built(model):
        raise ValueError(
            "Only a model that is built has a plan. Received: model "
            f"{model.name!r}, which is not built. Give it a `keras.Input`, or "
            "call it on a batch."
        )
    variables = [
        variable
        for variable in model.trainable_variables
        if not takes_gradient_as_value(variable)
    ]
    if not variables:
        raise ValueError(
            "Only a model that trains something has a plan. Received: model "
            f"{model.name!r}, with {len(model.variables)} variables, none of "
            "them trainable, so `fit` sends no gradients. Set "
            "`trainable = True` on the layers to train, then compile it."
        )
    return variables


def _has_call(model: keras.Model) -> bool:
    """Whether a model can be called: a GAN may only have a `train_step`."""
    return type(model).call is not keras.Model.call


def _is_built(model: keras.Model) -> bool:
    """Whether all variables of a model exist."""
    if _has_call(model):
        return bool(model.built)
    return bool(model.layers) and all(map(_is_built_layer, model.layers))


def _is_built_layer(layer: Any) -> bool:
    """Whether all variables of a layer, or of a model in it, exist."""
    if isinstance(layer, keras.Model):
        return _is_built(layer)
    return bool(layer.built)


def _inputs_of(model: keras.Model) -> Any:
    """The structure of symbolic inputs that a model knows of, or `None`."""
    if not _has_call(model):
        return None
    if isinstance(model, keras.Sequential):
        inputs = getattr(model, "inputs", None)
        return inputs and inputs[0]
    try:
        return model.input
    except (AttributeError, ValueError):
        return None


def _trace(
    model: keras.Model, strategy: Any, variables: Sequence[Any], inputs: Any
) -> list[Any]:
    """The spec of each variable's gradient on one replica, `None` if none."""
    found: list[list[Any]] = []

    def on_replica(x: Any) -> None:
        with tf.GradientTape() as tape:
            outputs = model(x, training=False)
            total = tf.add_n(
                [
                    tf.reduce_sum(tf.cast(output, tf.float32))
                    for output in [
                        *keras.tree.flatten(outputs),
                        *model.losses,
                    ]
                    if output.dtype.is_floating
                ]
            )
        found.append(
            tape.gradient(total, [variable.value for variable in variables])
        )

    @tf.function(autograph=False)
    def step(x: Any) -> None:
        strategy.run(on_replica, args=(x,))

    step.get_concrete_function(keras.tree.map_structure(_spec, inputs))
    return [
        None if gradient is None else _spec_of(gradient)
        for gradient in found[0]
    ]


def _spec(value: Any) -> tf.TypeSpec:
    """The spec of an input: array, tensor, spec or symbolic tensor."""
    if isinstance(value, (tf.TypeSpec, tf.Tensor)):
        return value if isinstance(value, tf.TypeSpec) else _any_batch(value)
    if getattr(value, "sparse", False):
        return tf.SparseTensorSpec(value.shape, value.dtype)
    if getattr(value, "ragged", False):
        return tf.RaggedTensorSpec(value.shape, value.dtype)
    return _any_batch(value)


def _any_batch(value: Any) -> tf.TensorSpec:
    shape = tuple(value.shape)
    return tf.TensorSpec((None, *shape[1:]) if shape else (), value.dtype)


def _spec_of(gradient: Any) -> tf.TensorSpec | RowsSpec:
    if isinstance(gradient, tf.IndexedSlices):
        return RowsSpec(gradient.shape, gradient.dtype)
    return tf.TensorSpec(gradient.shape, gradient.dtype)


def _dense(like: Any) -> tf.TensorSpec:
    return tf.TensorSpec(like.shape, like.dtype)
