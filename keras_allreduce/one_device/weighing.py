"""Each replica's share of a batch, and when to weigh its loss by it.

Keras gives every replica the mean loss over its part of the batch, divided by
the number of replicas R. The sum of these is the mean over the whole batch
only if all parts are equal. With n_r of N samples on replica r, the loss times
n_r R / N gives the right one whatever the parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import distribute
from keras_allreduce.reduce.scaling import scale

MEANS = frozenset({"sum_over_batch_size", "mean"})
WEIGHTED_MEAN = "mean_with_sample_weight"


@dataclass(frozen=True)
class Rule:
    """How the loss of a replica goes into that of the batch.

    Attributes:
        kind: `"samples"`: by its number of samples. `"sample_weights"`: by
            the sum of its sample weights. `"sum"`: it is added up. `"as_is"`:
            not known, so nothing is done to it.
        doubt: Why it cannot be known that this is right, for a warning.
        suspects: Losses of the user's own; they are means only if they return
            one value per sample.
    """

    kind: str
    doubt: str = ""
    suspects: tuple[Callable[..., Any], ...] = ()


def find_rule(
    model: keras.Model, step: str, weigh_samples: bool | None
) -> Rule:
    """The rule for a step of `model`.

    Args:
        model: A compiled model.
        step: `"train_step"` or `"test_step"`.
        weigh_samples: `True` and `False` decide; `None` looks at the model.
    """
    if weigh_samples is not None:
        return Rule("samples" if weigh_samples else "as_is")
    if getattr(type(model), step) is not getattr(keras.Model, step):
        return Rule("as_is", f"the model has a `{step}` of its own")
    if type(model).compute_loss is not keras.Model.compute_loss:
        return Rule("as_is", "the model has a `compute_loss` of its own")
    losses = [loss for loss in keras.tree.flatten(model.loss) if loss]
    strange = [
        loss
        for loss in losses
        if isinstance(loss, keras.losses.Loss)
        and type(loss).__call__ is not keras.losses.Loss.__call__
    ]
    if strange:
        return Rule("as_is", f"{_name(strange[0])} has its own `__call__`")
    reductions = {_reduction(loss) for loss in losses}
    suspects = tuple(loss for loss in losses if _is_users_own(loss))
    if reductions <= MEANS:
        return Rule("samples", suspects=suspects)
    if reductions == {"sum"}:
        return Rule("sum", suspects=suspects)
    if reductions == {WEIGHTED_MEAN} and len(losses) == 1:
        return Rule("sample_weights", suspects=suspects)
    return Rule(
        "as_is",
        "its losses are reduced in ways that do not go together "
        f"({', '.join(sorted(str(name) for name in reductions))})",
    )


def returns_one_value(
    losses: Sequence[Callable[..., Any]], y: Any, y_pred: Any
) -> Callable[..., Any] | None:
    """The first of `losses` that does not keep the samples apart, if any.

    The losses are traced for their shapes, and not run.
    """
    pairs = list(
        zip(keras.tree.flatten(y), keras.tree.flatten(y_pred), strict=False)
    )
    for loss in losses:
        traced = tf.function(getattr(loss, "call", loss), autograph=False)
        for true, predicted in pairs:
            shapes = traced.get_concrete_function(
                tf.TensorSpec(true.shape, true.dtype),
                tf.TensorSpec(predicted.shape, predicted.dtype),
            ).output_shapes
            if isinstance(shapes, tf.TensorShape) and shapes.rank == 0:
                return loss
    return None


def doubt_of_scalar(loss: Callable[..., Any]) -> str:
    """What is wrong with a loss that returns one value for all samples."""
    return (
        f"The loss {_name(loss)} returns one value for all samples, which "
        "Keras does not divide by the number of replicas: gradients may be as "
        "many times those of one device. Return one value per sample and let "
        "Keras take the mean. AllReduceStrategy(weigh_samples=False) says "
        "that the loss is right as it is."
    )


def doubt_of_rule(rule: Rule) -> str:
    """What may be wrong where the rule is not known."""
    return (
        "When a batch does not divide evenly between the replicas, the "
        f"result may differ from that of one device: {rule.doubt}. Pass "
        "weigh_samples=True to AllReduceStrategy if the loss is a mean over "
        "samples divided by the number of replicas, False if it is right as "
        "it is."
    )


def parts(data: Any) -> tuple[Any, Any]:
    """The first input and the sample weights of a batch, or `None`s."""
    x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    inputs = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    weights = keras.tree.flatten(sample_weight)
    return (
        inputs[0] if inputs else None,
        weights[0] if len(weights) == 1 else None,
    )


def sizes(
    replicas: Sequence[Any], num_workers: int = 1
) -> list[tf.Tensor] | None:
    """Number of samples of each replica, or `None` if all are surely equal.

    Args:
        replicas: The first input of each replica, batch first.
        num_workers: Number of workers; `replicas` are those of this one.
    """
    shapes = [tf.TensorShape(value.shape) for value in replicas]
    static = {shape[0] if shape.rank else None for shape in shapes}
    # A traced shape holds for every batch, on all workers; an eager one only
    # for this batch here.
    known_of_all = num_workers == 1 or not tf.executing_eagerly()
    if len(static) == 1 and static != {None} and known_of_all:
        return None
    return [
        tf.cast(tf.shape(value, out_type=tf.int64)[0], tf.float32)
        for value in replicas
    ]


def shares(
    amounts: Sequence[tf.Tensor],
    total: tf.Tensor | None = None,
    count: int | None = None,
) -> list[tf.Tensor]:
    """Share of each replica in the batch, times the number of replicas.

    Args:
        amounts: float32 scalars, one per replica.
        total: Their sum, if there are more replicas than these.
        count: The number of all replicas, likewise.

    Returns:
        float32 scalars whose mean is 1, or all 0 if all amounts are.
    """
    if total is None:
        total = tf.add_n(list(amounts))
    replicas = float(count or len(amounts))
    return [
        tf.math.divide_no_nan(amount * replicas, total) for amount in amounts
    ]


def logs(
    outputs: Any,
    seen: Any,
    devices: Sequence[str],
    local_values: Callable[[Any], Sequence[Any]],
) -> Any:
    """Makes Keras's plain mean over replicas one over samples.

    Args:
        outputs: What the replicas have returned, means over their samples.
        seen: Of how many each has seen; `None` leaves `outputs` as they are.
        devices: Device of each replica.
        local_values: Takes a distributed value apart.
    """
    if seen is None:
        return outputs
    with tf.device("/cpu:0"):
        of_replicas = shares(local_values(seen))

    def weigh(value: Any) -> Any:
        replicas = local_values(value)
        if not replicas or not replicas[0].dtype.is_floating:
            return value
        weighed = []
        for device, replica, share in zip(
            devices, replicas, of_replicas, strict=True
        ):
            with tf.device(device):
                weighed.append(scale(replica, share))
        return distribute.PerReplica(tuple(weighed))

    return keras.tree.map_structure(weigh, outputs)


def _reduction(loss: Any) -> Any:
    if isinstance(loss, keras.losses.Loss):
        return loss.reduction
    return "sum_over_batch_size"


def _is_users_own(loss: Any) -> bool:
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    named = loss if hasattr(loss, "__name__") else type(loss)
    if isinstance(loss, keras.losses.Loss):
        function = getattr(loss, "fn", None)
        named = function if function is not None else type(loss)
    return not getattr(named, "__module__", "").startswith("keras.")


def _name(loss: Any) -> str:
    return f"`{getattr(loss, '__name__', type(loss).__name__)}`"
