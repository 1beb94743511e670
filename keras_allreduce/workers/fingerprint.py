"""The fingerprints that the workers compare. No TensorFlow."""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_COLUMNS = 512


def checksum(array: Any) -> str:
    """Returns 8 hexadecimal digits that depend on every bit of an array.

    Sums of columns are 64 bits wide, and the CRC of the sums is taken: five
    times as fast as the CRC of all bytes, and blind only to words that changed
    places by multiples of 4 KiB.

    Args:
        array: A `numpy.ndarray` of any dtype.
    """
    array = np.ascontiguousarray(array)
    if array.dtype.hasobject:
        return _hex(zlib.crc32(repr(array.tolist()).encode()))
    octets = array.reshape(-1).view(np.uint8)
    whole = octets.size - octets.size % (8 * _COLUMNS)
    rows = octets[:whole].view(np.uint64).reshape(-1, _COLUMNS)
    crc = zlib.crc32(np.add.reduce(rows, axis=0).tobytes())
    return _hex(zlib.crc32(octets[whole:].tobytes(), crc))


def combined(checksums: Iterable[str]) -> str:
    """Returns one checksum of several, in their order."""
    return _hex(zlib.crc32(" ".join(checksums).encode()))


def _hex(number: int) -> str:
    return f"{number:08x}"


@dataclass(frozen=True)
class Fingerprint:
    """The side of one worker in a consistency check.

    Attributes:
        facts: Values by name, whose `str` must be the same on all workers.
        labels: Names of facts in messages, if not their own; may differ.
        offer: Values by name that may differ, for whoever reads them.
    """

    facts: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)
    offer: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the text that `from_json` reads."""
        facts = {key: str(value) for key, value in self.facts.items()}
        return json.dumps(
            {"facts": facts, "labels": {**self.labels}, "offer": {**self.offer}}
        )

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Reads what `to_json` has written."""
        return cls(**json.loads(text))


def difference(
    chief: Fingerprint, other: Fingerprint, names: tuple[str, str]
) -> list[str]:
    """The first fact in which a worker differs from the chief, if any."""
    missing = [key for key in other.facts if key not in chief.facts]
    labels = {**other.labels, **chief.labels}
    for key in [*chief.facts, *missing]:
        one = chief.facts.get(key, "none")
        another = other.facts.get(key, "none")
        if one != another:
            return [
                f"{labels.get(key, key)}: {names[0]} has {one}, "
                f"{names[1]} has {another}"
            ]
    return []


def in_another_order(
    kind: str, found: Sequence[Fingerprint]
) -> list[Fingerprint]:
    """The first path that stands in another order than the chief's.

    Args:
        kind: The kind of object that has the paths.
        found: The fingerprints of all workers; each offers `"paths"`.

    Returns:
        A fingerprint for each worker that shows it; none if all agree.
    """
    paths = [json.loads(each.offer["paths"]) for each in found]
    places = [first_in_another_order(paths[0], each) for each in paths]
    first = min((p for p in places if p is not None), default=None)
    if first is None:
        return []
    shown = [
        paths[0][first] if place is None else names[first]
        for names, place in zip(paths, places, strict=True)
    ]
    return [Fingerprint({f"{kind} {first}": repr(path)}) for path in shown]


def first_in_another_order(
    chief: Sequence[str], other: Sequence[str]
) -> int | None:
    """The first place at which names of one order stand in another, if any.

    Names that only one of the workers has say nothing: a script may put the
    name of a host into them, or a number that it counts.
    """
    if Counter(chief) == Counter(other):
        return _first(chief, other, set(chief))
    chief, other = without_numbers(chief), without_numbers(other)
    if len(chief) != len(other):
        return None
    return _first(chief, other, set(chief) & set(other))


def without_numbers(paths: Sequence[str]) -> list[str]:
    """Paths without the numbers at the ends of names."""
    return [re.sub(r"_?\d+(?=/|$)", "", path) for path in paths]


def _first(
    chief: Sequence[str], other: Sequence[str], names: set[str]
) -> int | None:
    for place, (one, another) in enumerate(zip(chief, other, strict=True)):
        if one != another and names & {one, another}:
            return place
    return None
