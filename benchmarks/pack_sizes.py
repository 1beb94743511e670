"""What the size of packs costs on logical CPU devices, interleaved in one run.

    python benchmarks/pack_sizes.py --replicas 2

For sets of gradients, the time of a step that makes the gradients, reduces
them and uses the result, less the time of the same step without reducing.
Columns are settings of `PackSize`: up to which size gradients travel together
("alone above"; 0: none do), and the capacity of a pack. Sums are checked.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import keras_allreduce
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.transport import InProcess

KIB, MIB = 2**10, 2**20

GRADIENTS = {
    "1 x 64 MiB": [(16 * MIB,)],
    "6 x 4 MiB": [(MIB,)] * 6,
    "122 of a deep narrow net": [(64, 64), (64,)] * 61,
    "240 x 64 B": [(16,)] * 240,
    "161 like ResNet-50's": (
        [(64,)] * 53
        + [(256,)] * 53
        + [(1, 1, 64, 256)] * 16
        + [(3, 3, 64, 64)] * 13
        + [(1, 1, 256, 1024)] * 18
        + [(3, 3, 256, 256)] * 8
    ),
}

SIZES = {
    "shared_memory": {
        "alone": PackSize(MIB, alone_above=0),
        "4 KiB in 1 MiB": PackSize(MIB, 256 * KIB, alone_above=4 * KIB),
        "16 KiB in 1 MiB": PackSize(MIB, 256 * KIB, alone_above=16 * KIB),
        "16 KiB in 4 MiB": PackSize(4 * MIB, 256 * KIB, alone_above=16 * KIB),
        "64 KiB in 1 MiB": PackSize(MIB, 256 * KIB, alone_above=64 * KIB),
        "all in 4 MiB": PackSize(4 * MIB, 1 * MIB),
        "all in 25 MiB": PackSize(25 * MIB, 1 * MIB),
    },
    "ring": {
        "all in 256 KiB": PackSize(256 * KIB),
        "all in 1 MiB": PackSize(MIB),
        "all in 4 MiB": PackSize(4 * MIB, MIB),
        "all in 25 MiB": PackSize(25 * MIB, MIB),
    },
}


class OfSize(InProcess):
    """Sums in packs of a given `PackSize`."""

    def __init__(self, size: PackSize):
        self._size = size

    def pack_size(self, algorithm, specs):
        return self._size


class Sized(BatchAllReduce):
    """BatchAllReduce with a given `PackSize`."""

    def __init__(self, algorithm: str, size: PackSize):
        super().__init__(algorithm)
        self._transport = OfSize(size)


def make_step(devices, variables, ops: BatchAllReduce | None):
    """A step over `variables[replica][i]`; without `ops` nothing is reduced."""

    @tf.function
    def step(factor):
        gradients = []
        for device, replica in zip(devices, variables, strict=True):
            with tf.device(device):
                gradients.append([v * factor for v in replica])
        if ops is not None:
            gradients = [
                list(replica)
                for replica in zip(
                    *ops._reduce_in_packs(
                        tf.distribute.ReduceOp.SUM,
                        [list(g) for g in zip(*gradients, strict=True)],
                        tuple(devices),
                        None,
                    ),
                    strict=True,
                )
            ]
        for device, replica, totals in zip(
            devices, variables, gradients, strict=True
        ):
            with tf.device(device):
                for variable, total in zip(replica, totals, strict=True):
                    variable.assign_sub(1e-9 * total)
        return [replica[0] for replica in gradients]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    devices = keras_allreduce.host_devices(args.replicas)
    tf.get_logger().setLevel("ERROR")
    factor = tf.constant(1.0)
    for algorithm, sizes in SIZES.items():
        print(f"\n{algorithm}, {args.replicas} replicas: ms added to a step\n")
        print("| gradients | " + " | ".join(sizes) + " |")
        print("|---" * (len(sizes) + 1) + "|")
        for name, shapes in GRADIENTS.items():
            variables = []
            for device in devices:
                with tf.device(device):
                    variables.append([tf.Variable(tf.ones(s)) for s in shapes])
            steps = {"": make_step(devices, variables, None)}
            for label, size in sizes.items():
                steps[label] = make_step(
                    devices, variables, Sized(algorithm, size)
                )
                for total in steps[label](factor):
                    np.testing.assert_allclose(total, args.replicas, rtol=1e-4)
            rounds = args.rounds if len(shapes) > 1 else args.rounds // 4
            times = {label: [] for label in steps}
            for _ in range(rounds):
                for label, step in steps.items():
                    start = time.perf_counter()
                    step(factor)
                    times[label].append(time.perf_counter() - start)
            base = np.array(times.pop(""))[3:]
            cells = [
                f"{np.median(np.array(seconds)[3:] - base) * 1e3:.2f}"
                for seconds in times.values()
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
