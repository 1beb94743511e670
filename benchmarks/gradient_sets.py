"""Sets of gradients that benchmarks reduce, as lists of shapes of float32."""

import math
from collections.abc import Callable

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
