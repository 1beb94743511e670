"""Makes N replicas equal one device under Keras's own steps.

A mean over a batch is not the mean of the means over its parts unless the
parts are equal; clipping the parts does not clip the sum; and a seed that all
replicas share gives all of them the same dropout mask. Keras leaves all three
to the strategy, and a strategy sees neither loss nor optimizer. So while a
step of Keras runs (or is traced), the methods of this model's objects that
decide about them are shadowed by ours. Afterwards the objects are as they
were; no class is touched.

    Keras's step                 shadowed by
    model.compute_loss           loss.py    empty replica: 0
    loss_metric.update_state     loss.py    the share of each replica
    optimizer.scale_loss         loss.py    scaled by the share of the batch
    optimizer.apply              update.py  all-reduce, then Keras's: finite
                                            check, accumulate, clip, update
    seed_generator.next          step.py    another one per replica
    statistics.assign            moving_statistics.py
                                            then one mean for all workers
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device import empty_replica, logs, replica, rules
from keras_allreduce.one_device.loss import ScaledLoss
from keras_allreduce.one_device.moving_statistics import SharedStatistics
from keras_allreduce.one_device.replica import Replica
from keras_allreduce.one_device.replicas import Replicas
from keras_allreduce.one_device.shares import BatchShares, shares_of_batch
from keras_allreduce.one_device.synchronized_layers import SynchronizedSums
from keras_allreduce.one_device.update import SummedUpdate
from keras_allreduce.reduce.observe import BatchRecord

_do_not_convert = tf.autograph.experimental.do_not_convert


class Step:
    """One run (or trace) of a step of Keras on all replicas.

    Args:
        model: The model whose step it is.
        name: `"train_step"` or `"test_step"`.
        replicas: The replicas of this worker.
        weigh_samples: See `rules.find_rule`.
        note: Called with the records of accumulated gradients.

    Attributes:
        sums: The sums that layers make over the replicas, while it runs.
    """

    def __init__(
        self,
        model: keras.Model,
        name: str,
        replicas: Replicas,
        weigh_samples: bool | None,
        note: Callable[[Sequence[BatchRecord]], None],
    ):
        self._model = model
        self._name = name
        self._replicas = replicas
        self._must_scale = weigh_samples is True
        self._note = note
        self._rule = rules.find_rule(model, name, weigh_samples)
        self.sums: SynchronizedSums | None = None
        if self._rule.reason and name == "train_step":
            rules.warn_of_unknown_rule(model, self._rule)

    def run(
        self,
        call_for_each_replica: Callable[..., Any],
        fn: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Runs `fn` on every replica, as `call_for_each_replica` does."""
        # data[replica]
        #   [1] shares[replica] of the batch, and a spare sample for those
        #       that have none
        #   [2] shadows: loss, optimizers, seeds, statistics of the model
        #   [3] every replica in its own thread:
        #       [3a] borrow the spare sample
        #       [3b] Keras: forward, loss, backprop, sum of gradients, update
        #       [3c] forget the spare sample
        #   [4] statistics[replica] -> one mean for all workers
        #   [5] logs[replica] -> as of one device
        data, *rest = args
        shares = shares_of_batch(data, self._rule, self._replicas)  # [1]
        spare = None
        if shares.share is not None:
            spare = empty_replica.spare_sample(data, self._replicas)
        statistics = SharedStatistics(self._model, self._replicas)
        with contextlib.ExitStack() as stack:
            for owner, methods in self._shadows(shares, statistics):  # [2]
                stack.enter_context(_shadowed(owner, methods))
            outputs, seen = call_for_each_replica(  # [3]
                _do_not_convert(partial(self._on_replica, fn, spare)),
                (shares.of_replicas(), data, *rest),
                kwargs,
            )
        statistics.take_means(shares.share)  # [4]
        return logs.mean_over_samples(outputs, seen, self._replicas)  # [5]

    def _on_replica(
        self,
        fn: Callable[..., Any],
        spare: Any,
        shares: tuple[Any, Any, Any],
        data: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """The logs of one replica, and of how many samples they are means.

        The latter is `None` if the logs are to stay as they are.
        """
        this = Replica(*shares)
        with replica.running(this):
            if this.has_samples is None or not self._rule.is_known:
                return fn(data, *args, **kwargs), None
            before = empty_replica.state(self._model)
            data = empty_replica.with_a_sample(  # [3a]
                data, this.has_samples, spare
            )
            outputs = fn(data, *args, **kwargs)  # [3b]
            empty_replica.restore(this.has_samples, before)  # [3c]
            if not logs.are_metric_results(self._model, self._name):
                return outputs, None
            return (
                self._model.get_metrics_result(),
                logs.samples_seen(self._model),
            )

    def _shadows(
        self, shares: BatchShares, statistics: SharedStatistics
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The shadowed objects, each with its methods."""
        on_workers = (
            self._name == "train_step" and self._replicas.num_workers > 1
        )
        self.sums = SynchronizedSums(
            self._replicas,
            shares.has_samples if self._rule.is_known else None,
            # A custom step does not show where its backprop begins.
            in_backprop=not keras_compat.is_keras_method(
                self._model, self._name
            ),
        )
        yield from ScaledLoss(
            self._model, self._rule, self.sums, on_workers=on_workers
        ).shadows()
        yield from SummedUpdate(
            self._model,
            self._replicas,
            shares.on_host,
            must_scale=self._must_scale,
            note=self._note,
        ).shadows()
        for generator in keras_compat.seed_generators(self._model):
            yield generator, {"next": partial(_next_seed, generator.next)}
        if on_workers:
            yield from statistics.shadows()


def _next_seed(keras_next: Callable[..., Any], ordered: bool = True) -> Any:
    """A seed that no other replica has; replica 0 has Keras's."""
    seed = keras_next(ordered)
    context = tf.distribute.get_replica_context()
    if context is None:
        return seed
    number = tf.cast(context.replica_id_in_sync_group, seed.dtype)
    # Far apart, whatever seeds the layers of the model were given.
    return seed + number * tf.constant([1_000_003, 0], seed.dtype)


@contextlib.contextmanager
def _shadowed(owner: Any, methods: dict[str, Any]) -> Iterator[None]:
    """Replaces methods of one object inside the block."""
    # Past __setattr__, in which Keras tracks what is assigned.
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    # Plain Python, also inside a tf.function of the user's.
    own.update({name: _do_not_convert(methods[name]) for name in methods})
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
