"""Plans in how many parts XLA compiles what ends in gradients. No TensorFlow.

Gradients leave when the program ends that they are in. With more programs more
of the all-reduce is hidden behind the next one; with fewer XLA can fuse more.
"""

from collections.abc import Sequence

from keras_allreduce.reduce.buckets import Bucket

MOST_PARTS = 8
"""See "The all-reduce stays hidden" in docs/xla.md."""


def parts_of(packs: Sequence[Bucket]) -> list[tuple[int, ...]]:
    """Groups packs whose gradients are to come out of one program.

    Args:
        packs: The packs of a plan.

    Returns:
        Indices of gradients, part by part in the order of backprop, of about
        the same bytes: at most `MOST_PARTS`, each of whole packs. A pack of
        unknown size counts as the mean of the others.
    """
    known = [pack.nbytes for pack in packs if pack.nbytes is not None]
    mean = sum(known) / len(known) if known else 1.0
    sizes = [mean if pack.nbytes is None else pack.nbytes for pack in packs]
    order = sorted(range(len(packs)), key=lambda at: -packs[at].indices[-1])
    capacity = max(sum(sizes), 1) / MOST_PARTS
    parts: list[tuple[int, ...]] = []
    before = 0.0
    last = -1
    for at in order:
        # The part in which the middle of the pack lies.
        part = int((before + sizes[at] / 2) / capacity)
        before += sizes[at]
        if part == last:
            parts[-1] += packs[at].indices
        else:
            parts.append(packs[at].indices)
            last = part
    return parts
