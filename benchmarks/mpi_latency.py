"""Latency of a sum between workers, by size, in the terms of osu_allreduce.

    mpirun -n 2 python benchmarks/mpi_latency.py

As the OSU micro-benchmarks do, for each size: iterations that are not timed,
a barrier, iterations that are; the average latency of one, in microseconds, of
the slowest rank. Rounds of all columns take turns; the median is shown, and
algbw = S / t of ours.

MPI_Allreduce     plain, blocking, on arrays of NumPy: what the MPI can do
MPI in TF         the collective of this package in a `tf.function` that sums
                  again and again: submit, engine, result, in a loop
gRPC in TF        TensorFlow's ring (or exchange) in the same loop
loop alone        the same loop without a collective, for comparison

A sum of ours is checked against the plain one.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import command_line
import numpy as np
import tensorflow as tf
from mpi4py import MPI

import keras_allreduce
from keras_allreduce.compat import runtime
from keras_allreduce.workers.collectives import CollectiveGroup, Collectives
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.mpi.collectives import MpiCollectives
from keras_allreduce.workers.mpi.engine import Engine
from keras_allreduce.workers.wire import Wire

COLUMNS = ("MPI_Allreduce", "MPI in TF", "gRPC in TF", "loop alone")


def loop_of(wire):
    """A function that sums a tensor `times` times, each after the last."""

    @tf.function(reduce_retracing=True)
    def sum_again_and_again(tensor, times):
        total = tensor
        for _ in tf.range(times):
            summed = wire.all_reduce(tensor, "message") if wire else tensor
            # The next waits for this one, and adds nothing to look at.
            with tf.control_dependencies([summed]):
                tensor = tf.identity(tensor)
            total = summed
        return total

    return sum_again_and_again


class Plain:
    """MPI_Allreduce on arrays."""

    def __call__(self, tensor, times):
        own = tensor.numpy()
        total = np.empty_like(own)
        for _ in range(int(times)):
            MPI.COMM_WORLD.Allreduce(own, total)
        return tf.constant(total)


def columns(strategy):
    extended = strategy.extended
    device, size = extended.worker_devices[0], extended.num_workers
    comm = MPI.COMM_WORLD.Dup()
    engine = Engine(MPI, comm, runtime.abort_collectives)
    group = CollectiveGroup(size, device)
    over_mpi = MpiCollectives(engine, group, InFlight())
    over_grpc = Collectives(CollectiveGroup(size, device), InFlight())
    functions = [
        Plain(),
        loop_of(Wire(over_mpi, size)),
        loop_of(Wire(over_grpc, size)),
        loop_of(None),
    ]
    return dict(zip(COLUMNS, functions, strict=True))


def latency_us(function, tensor, times):
    function(tensor, tf.constant(max(1, times // 10)))
    MPI.COMM_WORLD.Barrier()
    start = time.perf_counter()
    function(tensor, tf.constant(times)).numpy()
    own = (time.perf_counter() - start) / times * 1e6
    return MPI.COMM_WORLD.allreduce(own, MPI.MAX)


def measure(functions, nbytes, args):
    rng = np.random.default_rng(MPI.COMM_WORLD.rank)
    values = rng.integers(-8, 8, max(1, nbytes // 4)).astype("float32")
    tensor = tf.constant(values)
    times = args.iterations if nbytes <= 2**16 else args.iterations // 10
    found = {name: [] for name in functions}
    for _ in range(args.rounds):
        for name, function in functions.items():
            found[name].append(latency_us(function, tensor, times))
    results = [
        functions[name](tensor, tf.constant(1)).numpy() for name in COLUMNS[:3]
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    return {name: statistics.median(each) for name, each in found.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="bytes")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sizes = args.sizes or [4**n for n in range(1, 13)]
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    functions = columns(strategy)
    show = MPI.COMM_WORLD.rank == 0
    if show:
        version = MPI.Get_library_version().split(",")[0]
        print(
            f"# {command_line.environment('tensorflow', 'mpi4py')}, {version}, "
            f"{MPI.COMM_WORLD.size} ranks, {args.rounds} rounds\n"
            "# average latency (us); bandwidth of ours in 10^9 bytes/s\n"
            f"#{'Size':>9}"
            + "".join(f"{name:>15}" for name in COLUMNS)
            + f"{'ours/plain':>12}{'algbw':>8}",
            flush=True,
        )
    for nbytes in sizes:
        found = measure(functions, nbytes, args)
        if show:
            ours = found[COLUMNS[1]]
            print(
                f"{nbytes:>10}"
                + "".join(f"{found[name]:>15.1f}" for name in COLUMNS)
                + f"{ours / found[COLUMNS[0]]:>12.2f}"
                + f"{nbytes / ours / 1e3:>8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
