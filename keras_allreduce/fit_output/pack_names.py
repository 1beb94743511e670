"""Names the content of a pack: whole layers, or single variables of them."""

from collections import Counter
from collections.abc import Sequence


def names_in_pack(
    paths: Sequence[str], indices: Sequence[int]
) -> tuple[str, ...]:
    """Names the layers and variables whose gradients a pack carries.

    Args:
        paths: Paths of all variables, such as `"sequential/dense/kernel"`.
        indices: Those in the pack, in the order of backprop.

    Returns:
        In that order, the path of a layer if all its variables are in the
        pack, and else the paths of the variables.
    """
    layers = [path.rpartition("/")[0] for path in paths]
    has = Counter(layers)
    here = Counter(layers[index] for index in indices)
    names = [
        layers[index]
        if layers[index] and here[layers[index]] == has[layers[index]]
        else paths[index]
        for index in indices
    ]
    return tuple(dict.fromkeys(names))


def shortened(names: Sequence[str], most: int) -> list[str]:
    """The names, with `... n more` in the place of some if they are many.

    Args:
        names: Names in order. The first ones and the last one stay.
        most: Length of the result, at least 2.
    """
    if len(names) <= most:
        return list(names)
    left_out = f"... {len(names) - most + 1} more"
    return [*names[: most - 2], left_out, names[-1]]
