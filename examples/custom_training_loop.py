"""A custom training loop that reports the cost of its all-reduce.

Trains a dense network on the UCI handwritten digits of scikit-learn, on all
GPUs if there are two or more, otherwise on two logical CPU devices, and prints
the numbers that `model.fit` would show.

    python examples/custom_training_loop.py
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_allreduce

EPOCHS = 5
BATCH_SIZE = 50


def main() -> None:
    keras.utils.set_random_seed(1)
    devices = None
    if len(tf.config.list_physical_devices("GPU")) < 2:
        devices = keras_allreduce.host_devices(2)
    strategy = keras_allreduce.AllReduceStrategy(devices)

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        x.astype("float32") / 16, y, test_size=297, random_state=0
    )
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0)
    batches = strategy.experimental_distribute_dataset(data.batch(BATCH_SIZE))

    with strategy.scope():
        hidden = [keras.layers.Dense(512, "relu") for _ in range(3)]
        model = keras.Sequential(
            [keras.Input([64]), *hidden, keras.layers.Dense(10)]
        )
        optimizer = keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)

    def train_step(images, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                labels, model(images, training=True), from_logits=True
            )
            # Gradients are added up over replicas, so each replica divides
            # its sum by the size of the whole batch.
            loss = tf.reduce_sum(losses) / BATCH_SIZE
        gradients = tape.gradient(loss, model.trainable_variables)
        # Adds up the gradients of all replicas before it updates.
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    @tf.function
    def step(batch):
        return strategy.reduce("SUM", strategy.run(train_step, batch), None)

    for epoch in range(EPOCHS):
        losses = [step(batch) for batch in batches]
        stats = strategy.all_reduce_stats()
        print(
            f"epoch {epoch + 1}: loss {tf.reduce_mean(losses):.4f}, "
            f"all_reduce_ms {stats.all_reduce_ms:.4f}, "
            f"overlap {stats.overlap:.4f}, "
            f"{stats.all_reduce_gbps:.2f} GB/s over {stats.steps} steps "
            f"of {stats.num_packs} packs"
        )

    predicted = tf.argmax(model(x_test), axis=-1)
    print(f"test accuracy: {(predicted.numpy() == y_test).mean():.4f}")


if __name__ == "__main__":
    main()
