"""One XLA program for the update of a replica: clip, optimizer, constraints.

The gradients come from outside of XLA, and the update is the end of a step, so
it can be a function of its own. Its variables are then written in place, which
XLA does not do for ops that are marked one by one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_allreduce import xla_clusters


def run(apply: Callable[[list[Any]], Any], gradients: Sequence[Any]) -> Any:
    """Calls `apply` with the gradients, as one XLA program if it can be one.

    It cannot if an op has no kernel of XLA's, or with sparse gradients, as a
    program has fixed shapes and they have as many rows as a batch needs. On
    CPUs it is not worth it for plain SGD, whose few ops for each variable cost
    less than to pass the variable to a program. Then its ops are marked one by
    one, as all ops of a replica.

    Args:
        apply: Updates variables; to be called in a graph that is marked.
        gradients: Tensors or `None`s.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    if not given or not all(
        isinstance(each, tf.Tensor) and each.shape.is_fully_defined()
        for each in given
    ):
        return apply(list(gradients))
    results: list[Any] = []

    @tf.function(jit_compile=True, autograph=False)
    def update(*tensors: tf.Tensor) -> Any:
        left = iter(tensors)
        result = apply([g if g is None else next(left) for g in gradients])
        # Keras's optimizers return nothing, or a variable.
        results[:] = [result]
        return result if tf.is_tensor(result) else None

    compiled = update.get_concrete_function(*given)
    if not xla_clusters.is_worth_a_program(
        compiled.graph, given[0].device, parts=len(given)
    ):
        return apply(list(gradients))
    with xla_clusters.left_out():
        tensor = compiled(*given)
    return results[0] if tensor is None else tensor
