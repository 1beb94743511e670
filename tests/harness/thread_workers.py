"""Workers that are threads of one process, each with devices of its own.

    thread 0    Worker 0    CPU:0, CPU:1 ─┐
    thread 1    Worker 1    CPU:2, CPU:3 ─┴─ TensorFlow's collectives

`WorkerGroup`, the wire, the collectives and all that a step does are real. What
is not there: the connection, the watchdog, and what compares workers, which
need processes. A program is built by one worker after the other, since seeds
belong to the process, and trained by all at once.
"""

import threading
from types import SimpleNamespace

import tensorflow as tf
from deadlines import DEADLINE_SECONDS
from programs import data, run

from keras_allreduce.compat.datasets import SplitDataset
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.strategy.datasets import distribute
from keras_allreduce.strategy.multi_worker import MultiWorkerAllReduceStrategy
from keras_allreduce.strategy.multi_worker_extended import (
    MetricSums,
    MultiWorkerAllReduceExtended,
)
from keras_allreduce.strategy.one_machine import AllReduceExtended
from keras_allreduce.workers.collectives import CollectiveGroup, Collectives
from keras_allreduce.workers.group import WorkerGroup, WorkerOptions
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.wire_formats import EXACT

# Eager sums as over MPI: those over gRPC are TensorFlow's strategy's own.
OPTIONS = WorkerOptions(
    bytes_per_pack=0,
    timeout_seconds=DEADLINE_SECONDS,
    wire_format=EXACT,
    measure_lateness=False,
    sparse_as_dense=False,
    weigh_samples=None,
    transport="mpi",
)


def shard_of_batches(split, rank, size, num_replicas):
    """Leaves a data set that is split the parts of one worker.

    It stays a `SplitDataset`, for the iterators of this package: those of
    TensorFlow for several devices may end the process when workers that are
    threads make and drop them at once.
    """
    here = num_replicas // size

    def is_mine(number, part):
        return number // here % size == rank

    split._cloned_datasets = [
        parts.enumerate().filter(is_mine).map(lambda number, part: part)
        for parts in split._cloned_datasets
    ]
    return split


class ExtendedOfWorker(AllReduceExtended):
    """Reduces as the `extended` of several workers does."""

    def __init__(self, strategy, rank, size, devices, key):
        self._in_flight = InFlight()
        group = CollectiveGroup(size, devices[0], key)
        check = SimpleNamespace(
            rank=rank,
            compare_gradients=lambda gradients: None,
            broadcast_text=lambda text: text,
        )
        self._workers = WorkerGroup(
            size,
            check,
            calls=None,
            collectives=Collectives(group, self._in_flight),
            gpus=None,
            options=OPTIONS,
        )
        super().__init__(strategy, list(devices), BatchAllReduce())

        self.metric_sums = MetricSums(self._workers.all_reduce)

    @property
    def group(self):
        return self._workers

    @property
    def _num_replicas_in_sync(self):
        return self._workers.size * len(self.worker_devices)

    sum_gradients = MultiWorkerAllReduceExtended.sum_gradients
    _sum_over_replicas = MultiWorkerAllReduceExtended._sum_over_replicas

    def _experimental_distribute_dataset(self, dataset, options):
        self.metric_sums.forget()
        return distribute(
            dataset,
            lambda made: shard_of_batches(
                SplitDataset(
                    self._input_workers,
                    self._container_strategy(),
                    dataset=made,
                    num_replicas_in_sync=self._num_replicas_in_sync,
                ),
                self._workers.rank,
                self._workers.size,
                self._num_replicas_in_sync,
            ),
            self._num_replicas_in_sync,
        )


class Worker(MultiWorkerAllReduceStrategy):
    """The strategy of one worker, without what connects workers.

    Args:
        rank: Number of the worker.
        size: Number of workers.
        devices: Its devices.
        key: Number of their group, the same on all.
    """

    def __init__(self, rank, size, devices, key):
        self._init_options(weigh_samples=None, fit_log=False)
        extended = ExtendedOfWorker(self, rank, size, devices, key)
        tf.distribute.Strategy.__init__(self, extended)
        self._set_options_of_hints(extended.group.gradient_ops)


def results(name, devices):
    """What a program of the table comes to on each worker."""
    return results_of(lambda strategy: run(name, strategy)[0], devices)


def results_of(program, devices):
    """What a program comes to on each worker.

    Args:
        program: Trains under the strategy that it is called with, and calls
            `data.begin_fit` before it does.
        devices: `devices[worker][replica]`.
    """
    size, key = len(devices), CollectiveGroup(1, "").key
    turns = [threading.Semaphore(int(not rank)) for rank in range(size)]
    all_built = threading.Barrier(size)
    found, errors = [None] * size, [None] * size

    def train(rank):
        rank_of_thread.rank = rank
        turns[rank].acquire()
        try:
            strategy = Worker(rank, size, devices[rank], key)
            found[rank] = program(strategy)
        except BaseException as error:  # noqa: BLE001 - Raised below.
            errors[rank] = error
            turns[(rank + 1) % size].release()
            all_built.abort()

    rank_of_thread = threading.local()

    def is_built():
        """All others build before the first begins to train."""
        turns[(rank_of_thread.rank + 1) % size].release()
        all_built.wait(DEADLINE_SECONDS)

    threads = [
        threading.Thread(target=train, args=(rank,), daemon=True)
        for rank in range(size)
    ]
    with data.before_fit(is_built):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive(), f"It hangs on {size} workers"
    for error in errors:
        if error is not None:
            raise error
    return found
