"""Writes a Chrome trace in the format that TensorBoard's profile plugin reads.

The plugin shows XSpace messages (`xplane.proto` of OpenXLA), which are encoded
here by hand: TensorFlow has no public name for them. Only what a trace viewer
draws is written.

    XSpace      1: planes
    XPlane      1: id  2: name  3: lines  4: event_metadata (map)
    XLine       1: id  2: name  4: events
    XEvent      1: metadata_id  2: offset_ps  3: duration_ps
    XEventMetadata  1: id  2: name

A plane is a worker, and a line is a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PICOSECONDS_IN_MICROSECOND = 10**6

_VARINT, _BYTES = 0, 2


def encode(trace: Mapping[str, Any]) -> bytes:
    """Encodes what `chrome_trace.trace` returns as an XSpace.

    Args:
        trace: The trace. Slices become events; marks of epochs are left out,
            as an XSpace has no such thing.
    """
    events: Sequence[Mapping[str, Any]] = trace["traceEvents"]
    workers = sorted({event["pid"] for event in events})
    return b"".join(_field(1, _plane(worker, events)) for worker in workers)


def _plane(worker: int, events: Sequence[Mapping[str, Any]]) -> bytes:
    own = [event for event in events if event["pid"] == worker]
    slices = [event for event in own if event["ph"] == "X"]
    numbers: dict[str, int] = {}
    for event in slices:
        numbers.setdefault(event["name"], len(numbers) + 1)
    rows = {
        event["tid"]: event["args"]["name"]
        for event in own
        if event["name"] == "thread_name"
    }
    # The plugin draws planes of this name as they are.
    encoded = _field(1, worker + 1)
    encoded += _field(2, f"/device:CUSTOM:worker {worker}")
    for row, name in sorted(rows.items()):
        in_row = [event for event in slices if event["tid"] == row]
        encoded += _field(3, _line(row, name, in_row, numbers))
    for name, number in numbers.items():
        metadata = _field(1, number) + _field(2, name)
        encoded += _field(4, _field(1, number) + _field(2, metadata))
    return encoded


def _line(
    row: int,
    name: str,
    slices: Iterable[Mapping[str, Any]],
    numbers: Mapping[str, int],
) -> bytes:
    encoded = _field(1, row + 1) + _field(2, name)
    for event in slices:
        offset = round(event["ts"] * _PICOSECONDS_IN_MICROSECOND)
        duration = round(event["dur"] * _PICOSECONDS_IN_MICROSECOND)
        encoded += _field(
            4,
            _field(1, numbers[event["name"]])
            + _field(2, offset)
            + _field(3, duration),
        )
    return encoded


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a message: a number, a text or a message."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits in a byte, the low ones first; the last has no eighth."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
