"""How far rounding takes weights apart, under this strategy and a stock one.

    python benchmarks/rounding.py

N replicas add up N parts of a gradient in another order than one device does,
which differs in the last digit. A ReLU on the other side of 0 makes more of
that later. Trains the same model from the same seed on the same batches on one
device, under AllReduceStrategy and under MirroredStrategy with
ReductionToOneDevice, and prints the largest difference of a weight.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import models
import numpy as np
import tensorflow as tf

import keras_allreduce

BATCH_SIZE = 64
STEPS = [1, 10, 40]
PAIRS = [
    ("AllReduceStrategy", "one device"),
    ("ReductionToOneDevice", "one device"),
    ("AllReduceStrategy", "ReductionToOneDevice"),
]


def weights_by_steps(strategy: tf.distribute.Strategy, name: str) -> list:
    """Weights after each number of `STEPS`."""
    setup = models.MODELS[name]
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = models.compiled(setup)
    data = models.batches(models.batch(setup, BATCH_SIZE), BATCH_SIZE)
    found = []
    for steps in np.diff([0, *STEPS]):
        model.fit(data, steps_per_epoch=int(steps), verbose=0)
        found.append(model.get_weights())
    return found


def difference(one: list, other: list) -> float:
    return max(
        float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--model", choices=list(models.MODELS), default="cnn")
    args = parser.parse_args()
    devices = keras_allreduce.host_devices(args.replicas)
    strategies = {
        "one device": tf.distribute.get_strategy(),
        "AllReduceStrategy": keras_allreduce.AllReduceStrategy(devices),
        "ReductionToOneDevice": tf.distribute.MirroredStrategy(
            devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
        ),
    }
    weights = {
        name: weights_by_steps(strategy, args.model)
        for name, strategy in strategies.items()
    }
    steps = " | ".join(f"after {count} steps" for count in STEPS)
    print(f"| {args.model}, {args.replicas} replicas | {steps} |")
    print("|---" * (len(STEPS) + 1) + "|")
    for one, other in PAIRS:
        cells = [
            f"{difference(a, b):.1e}"
            for a, b in zip(weights[one], weights[other], strict=True)
        ]
        print(f"| {one} to {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
