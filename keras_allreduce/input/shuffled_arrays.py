"""Shuffles arrays in an order that all workers have, new in every epoch."""

from typing import Any

import tensorflow as tf

_do_not_convert = tf.autograph.experimental.do_not_convert


def shuffled(
    tensors: Any, num_samples: int, batch_size: int, seed: int
) -> tf.data.Dataset:
    """Returns batches of all samples, each epoch in another order.

    Args:
        tensors: Structure of tensors whose first dimension is `num_samples`.
        num_samples: Number of samples.
        batch_size: Samples in a batch; the last may have fewer.
        seed: Of the orders of all epochs.

    Returns:
        A data set of structures like `tensors`.
    """

    @_do_not_convert
    def order(epoch_seed: tf.Tensor) -> tf.data.Dataset:
        indices = tf.random.experimental.stateless_shuffle(
            tf.range(num_samples, dtype=tf.int64), [epoch_seed, epoch_seed]
        )
        return tf.data.Dataset.from_tensor_slices(indices).batch(batch_size)

    @_do_not_convert
    def gather(indices: tf.Tensor) -> Any:
        return tf.nest.map_structure(
            lambda tensor: (
                None if tensor is None else tf.gather(tensor, indices)
            ),
            tensors,
        )

    seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    return (
        seeds.take(1)
        .flat_map(order)
        .map(gather, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(_options())
    )


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # The state is that of the seeds, which workers share.
    options.experimental_external_state_policy = (
        tf.data.experimental.ExternalStatePolicy.IGNORE
    )
    return options
