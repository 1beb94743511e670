"""Handwritten digits on two workers that Ray Train starts.

`TensorflowTrainer` sets TF_CONFIG for each worker, and the strategy reads it.
On a Ray cluster the workers run on its nodes; otherwise on this machine.

    pip install "ray[train]"
    python examples/ray_train.py
"""

import os

from ray.train import ScalingConfig, report
from ray.train.tensorflow import TensorflowTrainer

EPOCHS = 5


def train() -> None:
    """Runs on every worker."""
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
    history = model.fit(x / 16, y, batch_size=64, epochs=EPOCHS, verbose=2)
    # Every worker must report; the metrics are those of worker 0.
    report(
        {
            "replicas": strategy.num_replicas_in_sync,
            "accuracy": history.history["accuracy"][-1],
        }
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    trainer = TensorflowTrainer(
        train,
        # With GPUs: use_gpu=True, which gives each worker one of its own.
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
    )
    metrics = trainer.fit().metrics
    print(f"replicas: {metrics['replicas']}")
    print(f"accuracy: {metrics['accuracy']:.4f}")
