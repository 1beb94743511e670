"""Models that the benchmarks train, and batches of made-up samples for them."""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

SEQUENCE, LONG_SEQUENCE, VOCABULARY = 64, 256, 8000
WORDS, EMBEDDED_WORDS = 32, 50_000


@dataclass(frozen=True)
class Setup:
    """A model with what it trains on.

    Attributes:
        make: Makes the model, whose outputs are logits.
        shape: Shape of one sample.
        ids_below: Samples are ids from 0 up to this; 0: floats.
        labels: Labels are numbers from 0 up to this.
        labels_shape: Shape of the labels of one sample.
        ids_dtype: NumPy's name of the dtype of ids.
    """

    make: Callable[[], keras.Model]
    shape: tuple[int, ...]
    ids_below: int = 0
    labels: int = 10
    labels_shape: tuple[int, ...] = ()
    ids_dtype: str = "int32"


def mlp() -> keras.Model:
    """5.5 M parameters in 4 large layers."""
    layers = [keras.layers.Dense(1600, "relu") for _ in range(2)]
    layers += [keras.layers.Dense(800, "relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([1000]), *layers])


def deep_narrow() -> keras.Model:
    """61 layers of 64 units: 122 small gradients."""
    layers = [keras.layers.Dense(64, "relu") for _ in range(60)]
    layers += [keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([64]), *layers])


def cnn() -> keras.Model:
    """Three convolutions and a dense layer on 32 x 32 images."""
    layers = [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(64, "relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential([keras.Input([32, 32, 3]), *layers])


def wide() -> keras.Model:
    """0.53 M parameters, each used at 64 places of an image.

    Backprop takes several times as long as 1 Gbit/s needs to carry its
    gradients.
    """
    layers = [
        keras.layers.Conv2D(128, 3, padding="same", activation="relu")
        for _ in range(4)
    ]
    layers += [keras.layers.Flatten(), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input([8, 8, 3]), *layers])


def resnet50() -> keras.Model:
    """ResNet-50 on 32 x 32 images: 23.6 M parameters in 214 gradients."""
    return keras.applications.ResNet50(
        weights=None,
        input_shape=(32, 32, 3),
        classes=10,
        classifier_activation=None,
    )


def resnet50_photos() -> keras.Model:
    """ResNet-50 on 224 x 224 photos of bytes: 25.6 M parameters."""
    photos = keras.Input([224, 224, 3], dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 127.5, -1)(photos)
    network = keras.applications.ResNet50(
        weights=None, input_tensor=scaled, classifier_activation=None
    )
    return keras.Model(photos, network.output)


class Positions(keras.layers.Layer):
    """Adds a trained vector to each place of a sequence."""

    def build(self, input_shape):
        self.positions = self.add_weight(
            shape=input_shape[1:], initializer="random_normal"
        )

    def call(self, sequence):
        return sequence + self.positions


def causal_transformer(sequence: int, width: int, blocks: int) -> keras.Model:
    """Causal blocks, with heads of 64, that predict the next of 8000 tokens."""
    tokens = keras.Input([sequence], dtype="int32")
    x = Positions()(keras.layers.Embedding(VOCABULARY, width)(tokens))
    for _ in range(blocks):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(num_heads=width // 64, key_dim=64)(
            y, y, use_causal_mask=True
        )
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * width, "gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(width)(y)])
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(tokens, keras.layers.Dense(VOCABULARY)(x))


def transformer() -> keras.Model:
    """4 blocks of width 256 on 64 tokens."""
    return causal_transformer(SEQUENCE, width=256, blocks=4)


def transformer_base() -> keras.Model:
    """12 blocks of width 768 on 256 tokens: 97 M parameters."""
    return causal_transformer(LONG_SEQUENCE, width=768, blocks=12)


def embedding() -> keras.Model:
    """A table of 50,000 x 64 and little else: a large sparse gradient."""
    layers = [
        keras.layers.Embedding(EMBEDDED_WORDS, 64),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(64, "relu"),
        keras.layers.Dense(10),
    ]
    return keras.Sequential([keras.Input([WORDS], dtype="int32"), *layers])


MODELS = {
    "mlp": Setup(mlp, (1000,)),
    "deep_narrow": Setup(deep_narrow, (64,)),
    "cnn": Setup(cnn, (32, 32, 3)),
    "wide": Setup(wide, (8, 8, 3)),
    "resnet50": Setup(resnet50, (32, 32, 3)),
    "transformer": Setup(
        transformer, (SEQUENCE,), VOCABULARY, VOCABULARY, (SEQUENCE,)
    ),
    "embedding": Setup(embedding, (WORDS,), ids_below=EMBEDDED_WORDS),
    "resnet50_photos": Setup(
        resnet50_photos, (224, 224, 3), 256, labels=1000, ids_dtype="uint8"
    ),
    "transformer_base": Setup(
        transformer_base,
        (LONG_SEQUENCE,),
        VOCABULARY,
        VOCABULARY,
        (LONG_SEQUENCE,),
    ),
}


def batch(setup: Setup, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`size` samples and their labels, always the same ones."""
    rng = np.random.default_rng(0)
    if setup.ids_below:
        shape = (size, *setup.shape)
        x = rng.integers(0, setup.ids_below, shape, setup.ids_dtype)
    else:
        x = rng.normal(size=(size, *setup.shape)).astype("float32")
    return x, rng.integers(0, setup.labels, (size, *setup.labels_shape))


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-4),
    "sgd": lambda: keras.optimizers.SGD(0.01),
}


def compiled(
    setup: Setup, *, optimizer: str = "sgd", jit_compile: bool = False
) -> keras.Model:
    """The model, made and compiled where the caller is: in a scope.

    Without XLA unless asked for: on a GPU Keras would compile with it, but
    only under no strategy.

    Args:
        setup: The model.
        optimizer: Key of `OPTIMIZERS`.
        jit_compile: Whether to compile with XLA.
    """
    model = setup.make()
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def batches(
    samples: tuple[np.ndarray, np.ndarray],
    batch_size: int,
    repeats: int | None = None,
) -> tf.data.Dataset:
    """Batches of a size that is not known in advance.

    Args:
        samples: Inputs and targets.
        batch_size: Samples in a batch.
        repeats: How often they come; `None`: without an end.
    """
    data = tf.data.Dataset.from_tensor_slices(samples)
    return data.repeat(repeats).batch(batch_size)
