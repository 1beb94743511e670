"""Trains on handwritten digits with two workers started by Ray Train.

`TensorflowTrainer` sets TF_CONFIG for each worker, and the strategy reads it.
On a Ray cluster the workers run on its nodes; otherwise on this machine.

    pip install "ray[train]"
    python examples/ray_train.py
"""

import os
import zlib

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Shows the lines of all workers.

from ray.train import ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

EPOCHS = 5


def train() -> None:
    """Runs on every worker."""
    # Ray sets it, for tf_keras. The workers use Keras 3.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)

    import keras
    from sklearn.datasets import load_digits

    import keras_allreduce

    # Before any other use of TensorFlow.
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    x, y = load_digits(return_X_y=True)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([64]),
                keras.layers.Dense(256, "relu"),
                keras.layers.Dense(10, "softmax"),
            ]
        )
        model.compile(
            "adam", "sparse_categorical_crossentropy", metrics=["accuracy"]
        )
    # The global batch, and all data on every worker: the strategy divides it.
    model.fit(x / 16, y, batch_size=64, epochs=EPOCHS, verbose=2)
    weights = b"".join(weight.tobytes() for weight in model.get_weights())
    # The same on all workers.
    index = strategy.cluster_resolver.task_id
    print(f"worker {index}: weights {zlib.crc32(weights):08x}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    trainer = TensorflowTrainer(
        train,
        # With GPUs: use_gpu=True, which gives each worker one of its own.
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
    )
    trainer.fit()
