"""Step time of `model.fit` between two workers on loopback.

    python benchmarks/workers_step_time.py

Each round starts the workers of every strategy anew, one strategy after the
other, and times the steps of `fit` after the first few; ratios are taken
within a round. The rival is TensorFlow's MultiWorkerMirroredStrategy with a
minimal mend of the two faults that keep it from running under Keras 3 at all:
the shapes of the first batch, and the mean of scalar logs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SKIPPED_STEPS = 10


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def strategies():
    import keras
    import tensorflow as tf

    import keras_allreduce

    class Mended(tf.distribute.MultiWorkerMirroredStrategy):
        def reduce(self, reduce_op, value, axis):
            if keras.tree.is_nested(value):
                return keras.tree.map_structure(
                    lambda leaf: self.experimental_local_results(leaf)[0],
                    value,
                )
            if axis == 0 and str(reduce_op).upper() == "MEAN":
                value = tf.convert_to_tensor(
                    self.experimental_local_results(value)[0]
                )
                total = self.extended.reduce_to("SUM", value, value)
                return total / self.num_replicas_in_sync
            return super().reduce(reduce_op, value, axis)

    return {
        "MultiWorkerMirroredStrategy (mended)": Mended,
        "MultiWorkerAllReduceStrategy": (
            keras_allreduce.MultiWorkerAllReduceStrategy
        ),
    }


def work(name: str, model_name: str, devices: int, steps: int) -> None:
    """Runs as one worker; the chief prints the seconds per step."""
    import keras
    import numpy as np
    import tensorflow as tf
    from step_time import MODELS

    import keras_allreduce

    if devices > 1:
        keras_allreduce.host_devices(devices)

    class Timer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            import time

            if batch + 1 == SKIPPED_STEPS:
                self.start = time.perf_counter()
            self.end = time.perf_counter()

    strategy = strategies()[name]()
    with strategy.scope():
        model, shape = MODELS[model_name]()
        model.compile(
            keras.optimizers.SGD(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, *shape)).astype("float32")
    y = rng.integers(0, 10, 64)
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(64)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    timer = Timer()
    model.fit(
        data.with_options(options),
        steps_per_epoch=steps,
        epochs=1,
        verbose=0,
        callbacks=[timer],
    )
    seconds = (timer.end - timer.start) / (steps - SKIPPED_STEPS)
    print(json.dumps({"seconds": seconds}))


def run(name: str, model: str, args: argparse.Namespace) -> float:
    """Seconds per step with the workers as processes on loopback."""
    cluster = [f"127.0.0.1:{port}" for port in free_ports(args.workers)]
    workers = []
    for index in range(args.workers):
        task = {"type": "worker", "index": index}
        environment = dict(
            os.environ,
            TF_CONFIG=json.dumps(
                {"cluster": {"worker": cluster}, "task": task}
            ),
        )
        command = [sys.executable, __file__, "--work-as", name]
        command += ["--models", model, "--devices", str(args.devices)]
        command += ["--steps", str(args.steps)]
        workers.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return json.loads(outputs[0].splitlines()[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--models", nargs="*", default=["mlp", "deep_narrow"])
    parser.add_argument("--work-as", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work_as:
        work(args.work_as, args.models[0], args.devices, args.steps)
        return
    import numpy as np

    names = list(strategies())
    print("| model | strategy | ms/step (min-max) | ratio |\n|---|---|---|---|")
    for model in args.models:
        times = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                times[name].append(run(name, model, args))
        stock = np.array(times[names[0]])
        for name in names:
            ours = np.array(times[name])
            print(
                f"| {model} | {name} | {np.median(ours) * 1e3:.1f} "
                f"({ours.min() * 1e3:.1f}-{ours.max() * 1e3:.1f}) | "
                f"{np.median(ours / stock):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
