"""Trains on handwritten digits with two workers, here two processes.

On two machines, run this file on both, each with its own TF_CONFIG in the
environment, or with `mpirun -n 2 --host a,b python examples/two_workers.py`.
Otherwise it starts itself twice on this machine, prints the output of the
first worker, the chief, and compares the weights of the two.

    python examples/two_workers.py
"""

import json
import os
import socket
import subprocess
import sys
import zlib

EPOCHS = 5


def train() -> None:
    """What every worker runs."""
    import keras
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    import keras_allreduce

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        x.astype("float32") / 16, y, test_size=297, random_state=0
    )
    keras.utils.set_random_seed(1)  # All workers shuffle alike.
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([64]),
                keras.layers.Dense(256, "relu"),
                keras.layers.Dense(256, "relu"),
                keras.layers.Dense(10, "softmax"),
            ]
        )
        model.compile(
            "adam", "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
    # The global batch: each worker takes its half of every 64 samples.
    model.fit(x, y, batch_size=64, epochs=EPOCHS, verbose=2)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"test accuracy: {accuracy:.4f}")
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    print(f"weights: {zlib.crc32(weights):08x}")


def launch() -> None:
    """Starts two workers on this machine and waits for them."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for index in range(2):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        workers.append(
            subprocess.Popen(
                [sys.executable, __file__],
                env={
                    **os.environ,
                    "TF_CONFIG": json.dumps(config),
                    # They cannot share a GPU.
                    "CUDA_VISIBLE_DEVICES": "-1",
                },
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    # A worker that has lost the other ends by itself, in an error.
    chief, other = [worker.communicate()[0] for worker in workers]
    print(chief, end="")
    if any(worker.returncode for worker in workers):
        sys.exit("A worker failed; see its error above.")
    same = chief.splitlines()[-1] == other.splitlines()[-1]
    print(f"both workers have the same weights: {same}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Set by hand or by the launcher, or by mpirun.
    if {"TF_CONFIG", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & set(os.environ):
        train()
    else:
        launch()
