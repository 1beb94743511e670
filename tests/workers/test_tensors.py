"""Tensors of any shape and dtype, gathered from workers that are threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from deadlines import DEADLINE_SECONDS

from keras_allreduce.workers.host_collectives import all_gather_tensors


class Threads:
    """Collectives of threads that call them in one order."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=DEADLINE_SECONDS)
        self.sent = [None] * count

    def of(self, index):
        return OfThread(self, index)


class OfThread:
    device = "/cpu:0"

    def __init__(self, threads, index):
        self.threads, self.index = threads, index

    def all_gather(self, tensor, purpose):
        sent, barrier = self.threads.sent, self.threads.barrier
        sent[self.index] = tensor
        barrier.wait()
        shapes = {tuple(each.shape) for each in sent}
        assert len(shapes) == 1, (purpose, shapes)
        gathered = tf.concat(sent, axis=0)
        barrier.wait()
        return gathered


DTYPES = ["bool", "uint8", "float16", "bfloat16", "float32", "float64"]
DTYPES += ["int8", "int32", "int64", "complex64"]


def tensors_of(worker):
    rng = np.random.default_rng(worker)
    tensors = [
        tf.cast(rng.integers(0, 2, [worker * number, 3]), dtype)
        for number, dtype in enumerate(DTYPES)
    ]
    return [*tensors, tf.constant([np.nan, -0.0, worker]), tf.zeros([0, 2])]


def test_every_worker_gets_the_tensors_of_all():
    threads = Threads(3)

    def gathered(worker):
        return all_gather_tensors(
            tensors_of(worker), "test", threads.of(worker), 3
        )

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(gathered, range(3)))
    for result in results:
        for worker, tensors in enumerate(result):
            for got, wanted in zip(tensors, tensors_of(worker), strict=True):
                assert got.dtype == wanted.dtype
                assert got.shape == wanted.shape
                np.testing.assert_array_equal(got.numpy(), wanted.numpy())
