"""Makes every loss that Keras computes the mean of this replica's samples.

A replica sees one device, so Keras's mean over its samples is just that, and
the mean of the replicas' losses, weighted by their samples, is that of the
batch. Other losses are corrected, so that the same holds for them:

    mean over samples                    as it is
    sum over samples                     / weight of the replica
    mean over unmasked values            * unmasked values here / in all
      (or over the sample weights)         / weight of the replica
    any other loss of `compile`          computed on the whole batch
    `add_loss` of one value              measured
    `add_loss` of a vector               a sum
    regularizers                         as they are
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_losses
from keras_allreduce.one_device import mixing, replica, warn, whole_batch
from keras_allreduce.one_device.reduction import Reductions
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import part_of_sum
from keras_allreduce.reduce.packing import scale
from keras_allreduce.reduce.plan import GatheredLoss


class LossOfTheReplica:
    """Shadows the methods of a model that compute its loss.

    Args:
        model: The model.
        replicas: The replicas of this worker.
        reductions: Tells means from sums.
        is_known: Whether the user has declared all losses, so that each
            replica computes its own.
        reads: Whether the forward pass is read, in search of what mixes
            samples.

    Attributes:
        gathered: The losses that are computed on the whole batch, by their
            number.
    """

    def __init__(
        self,
        model: keras.Model,
        replicas: Replicas,
        reductions: Callable[[], Reductions],
        *,
        is_known: bool,
        reads: bool = False,
    ):
        self._model = model
        self._replicas = replicas
        self._reductions = reductions
        self._is_known = is_known
        self._reads = reads
        self.gathered: dict[int, GatheredLoss] = {}

    def shadows(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The shadowed objects, each with its methods."""
        model = self._model
        if keras_compat.is_keras_method(model, "compute_loss"):
            compute = partial(self._compute_loss, model.compute_loss)
            yield model, {"compute_loss": compute}
        add = partial(self._add_loss, getattr(model, keras_losses.ADDS_A_LOSS))
        yield model, {keras_losses.ADDS_A_LOSS: add}

    def compiled(self, index: int, loss: Any) -> Callable[..., Any]:
        """The function that Keras calls in the place of a loss of `compile`."""
        return partial(self._compiled_loss, index, loss)

    def _compute_loss(
        self,
        keras_compute_loss: Callable[..., Any],
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        **training: Any,
    ) -> Any:
        """The loss of this replica; 0 on an empty one."""
        self._read_forward_pass(x, y_pred)
        loss = keras_compute_loss(x, y, y_pred, sample_weight, **training)
        return scale(loss, replica.current().has_samples)

    def _read_forward_pass(self, x: Any, y_pred: Any) -> None:
        """Warns, once, if the outputs of Keras's step mix the samples."""
        if not self._reads:
            return
        self._reads = False  # All replicas run the same.
        inputs, outputs = (
            [leaf for leaf in keras.tree.flatten(each) if _is_dense(leaf)]
            for each in (x, y_pred)
        )
        op = mixing.find(
            inputs,
            outputs,
            lambda name: keras_compat.is_keras_layer(
                keras_compat.innermost_layer(self._model, name)
            ),
        )
        if op is not None:
            layer = keras_compat.innermost_layer(self._model, op)
            warn.of_mixing(self._model, layer or self._model, op)

    def _compiled_loss(
        self,
        index: int,
        loss: Any,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
    ) -> Any:
        """The loss of one output, corrected to a mean."""
        given = y_true, y_pred, sample_weight
        if keras_losses.is_one_value_per_sample(loss, y_pred):
            value, _, mask = keras_losses.call_and_see(loss, *given)
            return self._of_samples(loss, value, mask, sample_weight)
        if self._is_known or not self._may_gather(index, loss, given):
            return self._of_replica(index, loss, given)
        if replica.is_measured():
            return whole_batch.stand_in(loss(*given), y_pred)
        return whole_batch.loss_of_batch(loss, *given, self._replicas)

    def _may_gather(self, index: int, loss: Any, given: Any) -> bool:
        """Whether the loss is computed on the whole batch, which is noted."""
        nbytes = whole_batch.bytes_of_a_sample(*given)
        name = keras_losses.name_of(loss)
        if not whole_batch.may_gather(self._replicas, *given):
            warn.of_large_loss(self._model, name, nbytes)
            return False
        self.gathered[index] = GatheredLoss(name, nbytes)
        return True

    def _of_replica(
        self, index: int, loss: Any, given: tuple[Any, Any, Any]
    ) -> Any:
        """The loss of the replica's samples: a mean or a sum of them."""
        if not keras_losses.reduces_as_keras(loss):
            return self._measured("loss", index, loss(*given))
        value, rank, mask = keras_losses.call_and_see(loss, *given)
        if rank == 0:
            return self._measured("loss", index, value)
        return self._of_samples(loss, value, mask, sample_weight=given[2])

    def _of_samples(
        self, loss: Any, value: Any, mask: Any, sample_weight: Any
    ) -> Any:
        """A loss of one value per sample, which Keras has reduced."""
        if keras_losses.is_sum(loss):
            if len(value.shape):  # Summed when it is differentiated.
                return value
            return scale(value, replica.current().inverse_weight())
        weighted = (
            keras_losses.reduction(loss) == keras_losses.WEIGHTED_MEAN
            and sample_weight is not None
        )
        if (
            weighted
            and mask is None
            and replica.current().correction is not None
        ):
            return scale(value, replica.current().correction)
        if weighted or mask is not None:
            weights = sample_weight if weighted else None
            return self._mean_of_counted(value, mask, weights)
        return value

    def _add_loss(self, keras_add: Callable[..., Any], loss: Any) -> Any:
        """One of `model.losses`, corrected to a mean."""
        value = keras_add(loss)
        number = replica.current().next_call("added")
        if number >= keras_losses.num_added_losses(self._model):
            return value  # That of a regularizer.
        if len(loss.shape):
            return scale(value, replica.current().inverse_weight())
        return self._measured("added", number, value)

    def _measured(self, kind: str, number: int, value: Any) -> Any:
        """A loss that only a measurement classifies."""
        this = replica.current()
        if this.recorder is not None:
            this.recorder.record((kind, number), value)
            return value
        if self._reductions().is_sum(kind, number):
            return scale(value, this.inverse_weight())
        return value

    def _mean_of_counted(self, value: Any, mask: Any, weights: Any) -> Any:
        """A mean over counted values, where replicas count differently."""
        this = replica.current()
        counted = tf.convert_to_tensor(1.0) if weights is None else weights
        counted = tf.cast(counted, tf.float32)
        if mask is not None:
            mask = tf.cast(mask, tf.float32)
            while len(counted.shape) > len(mask.shape):
                mask = mask[..., tf.newaxis]
            while 0 < len(counted.shape) < len(mask.shape):
                counted = counted[..., tf.newaxis]
            counted = counted * mask
        total = tf.reduce_sum(counted)
        if this.recorder is not None:
            # Linear in the samples: a mean over all of them.
            size = tf.cast(tf.shape(counted)[0], tf.float32)
            return scale(value, total / size)
        part = part_of_sum(scale(total, this.has_samples), self._replicas)
        return scale(value, part * this.inverse_weight())


def _is_dense(value: Any) -> bool:
    """Whether a value is a dense tensor of a graph."""
    return isinstance(value, tf.Tensor) and tf.is_symbolic_tensor(value)
