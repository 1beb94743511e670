"""Sets of gradients that benchmarks reduce, as lists of shapes of float32."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

MIB = 2**20
BYTES_PER_NUMBER = 4


def application(name: str) -> list[Shape]:
    """Shapes of the trainable variables of a model of keras.applications."""
    import keras

    model = getattr(keras.applications, name)(weights=None)
    return [tuple(variable.shape) for variable in model.trainable_variables]


def transformer(
    layers: int, width: int, vocabulary: int, length: int
) -> list[Shape]:
    """Shapes of a decoder whose embedding is dense and not shared.

    Args:
        layers: Number of blocks of attention and of two dense layers, the
            first four times as wide.
        width: Size of a token's vector.
        vocabulary: Number of tokens.
        length: Longest text in tokens.
    """
    normalization = [(width,), (width,)]
    attention = [(width, width), (width,)] * 4
    dense = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*normalization, *attention, *normalization, *dense]
    return [
        (vocabulary, width),
        (length, width),
        *block * layers,
        *normalization,
        (width, vocabulary),
        (vocabulary,),
    ]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "1 x 64 MiB": lambda: [(16 * MIB,)],
    "6 x 4 MiB": lambda: [(MIB,)] * 6,
    "ResNet-50": lambda: application("ResNet50"),
    "MobileNetV2": lambda: application("MobileNetV2"),
    "transformer": lambda: transformer(4, 256, 8000, 128),
    "240 x 64 B": lambda: [(16,)] * 240,
}


def nbytes(shapes: list[Shape]) -> int:
    """Bytes of all gradients of a set together."""
    return BYTES_PER_NUMBER * sum(math.prod(shape) for shape in shapes)


# Profiles ---------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Gradients of a model, and when backprop has them.

    Attributes:
        shapes: Shape of each gradient, in variable order.
        ready: Share of backprop after which each is ready. The last one of
            the list is the first.
        step_seconds: Seconds of a step on one device.
    """

    shapes: tuple[Shape, ...]
    ready: tuple[float, ...]
    step_seconds: float

    @classmethod
    def of(
        cls,
        shapes: Sequence[Shape],
        work: Sequence[float],
        step_seconds: float,
    ) -> "Profile":
        """Makes one from the products that backprop computes for each."""
        done = [*itertools.accumulate(reversed(work))]
        ready = tuple(each / done[-1] for each in reversed(done))
        return cls(tuple(shapes), ready, step_seconds)


def application_profile(name: str, step_seconds: float) -> Profile:
    """The profile of a model of keras.applications, whose kernels compute."""
    import keras

    shapes, work = [], []
    for layer in getattr(keras.applications, name)(weights=None).layers:
        for variable in layer.trainable_variables:
            is_kernel = len(variable.shape) > 1
            places = math.prod(layer.output.shape[1:-1])
            shapes.append(tuple(variable.shape))
            work.append(math.prod(variable.shape) * places * is_kernel)
    return Profile.of(shapes, work, step_seconds)


def bert_profile(step_seconds: float) -> Profile:
    """The profile of BERT-base, whose dense layers compute for each token."""
    width, layers, vocabulary, length = 768, 12, 30522, 512
    normalization = [(width,), (width,)]
    embeddings = [(vocabulary, width), (length, width), (2, width)]
    block = [
        *[(width, width), (width,)] * 4,
        *normalization,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
        *normalization,
    ]
    first, last = [*embeddings, *normalization], [(width, width), (width,)]
    work = [math.prod(each) if len(each) > 1 else 0 for each in block]
    return Profile.of(
        [*first, *block * layers, *last],
        [*[0] * len(first), *work * layers, *[0] * len(last)],
        step_seconds,
    )


# Step times of a P100, on which Horovod's figures were published, in float32:
# 64 images at the 219 and 154 a second of TensorFlow's own benchmarks
# (https://www.tensorflow.org/performance/benchmarks); of BERT 64 sequences of
# 128 tokens, 6 operations a token and weight, assumed to run at 6.4 TFLOPS.
PROFILES: dict[str, Callable[[], Profile]] = {
    "ResNet-50": lambda: application_profile("ResNet50", 64 / 219),
    "BERT": lambda: bert_profile(0.7),
    "VGG-16": lambda: application_profile("VGG16", 64 / 154),
}
