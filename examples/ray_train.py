"""Trains on handwritten digits with two workers started by Ray Train.

`TensorflowTrainer` sets TF_CONFIG for each worker, and the strategy reads it.
On a Ray cluster the workers run on its nodes; otherwise on this machine. If a
worker fails, Ray starts all of them again from the last checkpoint.

    pip install "ray[train]"
    python examples/ray_train.py
    python examples/ray_train.py --fail  # worker 1 fails once, in epoch 3
"""

import argparse
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Shows the lines of all workers.

import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

EPOCHS = 5


def train(options: dict[str, Any]) -> None:
    """Runs on every worker."""
    # Ray sets it, for tf_keras. The workers use Keras 3.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)

    import keras
    from sklearn.datasets import load_digits

    import keras_allreduce

    # Before any other use of TensorFlow.
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    index = strategy.cluster_resolver.task_id
    x, y = load_digits(return_X_y=True)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model, first_epoch = restored() or (new_model(), 0)
    for epoch in range(first_epoch, EPOCHS):
        # The same order of samples after a restart.
        keras.utils.set_random_seed(epoch)
        # The global batch, and all data on every worker: the strategy divides
        # it.
        history = model.fit(
            x / 16,
            y,
            batch_size=64,
            initial_epoch=epoch,
            epochs=epoch + 1,
            verbose=2,
        )
        if options["fail"] and epoch == 2 and first_epoch == 0 and index == 1:
            raise RuntimeError("worker 1 fails once, as asked for")
        report(model, epoch, history.history, is_chief=index == 0)
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    # The same on all workers.
    print(f"worker {index}: weights {zlib.crc32(weights):08x}")


def new_model() -> Any:
    """A model that has not been trained."""
    import keras

    layers = [
        keras.Input([64]),
        keras.layers.Dense(256, "relu"),
        keras.layers.Dense(10, "softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile(
        "adam", "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


def restored() -> tuple[Any, int] | None:
    """The model of the last checkpoint and its next epoch, after a restart."""
    import keras

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        epoch = int(Path(folder, "next_epoch").read_text())
        print(f"goes on with epoch {epoch + 1}")
        return keras.models.load_model(Path(folder, "model.keras")), epoch


def report(
    model: Any, epoch: int, history: dict[str, Any], *, is_chief: bool
) -> None:
    """Tells Ray the metrics of an epoch; the chief leaves a checkpoint."""
    metrics = {name: values[-1] for name, values in history.items()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if is_chief:
            model.save(Path(folder, "model.keras"))
            Path(folder, "next_epoch").write_text(str(epoch + 1))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"epoch": epoch, **metrics}, checkpoint=checkpoint)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fail", action="store_true", help="worker 1, once")
    trainer = TensorflowTrainer(
        train,
        train_loop_config=vars(parser.parse_args()),
        # With GPUs: use_gpu=True, which gives each worker one of its own.
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        # On several nodes: a folder that all of them share.
        run_config=RunConfig(
            storage_path=os.path.abspath("ray_results"),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()
