"""Numbers that people can read, in the columns that a terminal has.

Keras's bar formats every number as a float with four decimals. A `Readable` is
a float with a text of its own, which Keras prints in that place.

    57/57 ━━━━━━━━━━━━━━━━━━━━ 2s 15ms/step - loss: 0.6689 - overlap: 91%
    |rest||------ bar -------||-- rest --| |--- item ---|   |-- item --|

While the epoch runs the line is drawn again and again, which works only if it
does not wrap: the bar gets shorter, and items of ours are left out before the
terminal breaks the line. The last state of an epoch is broken between items.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BAR_COLUMNS = 20
"""Columns of Keras's bar where there is room."""

MIN_BAR_COLUMNS = 4
"""Columns of a bar that still shows how far an epoch is."""

# " 1:03 15ms/step" of a running epoch, and " - 12s - 15ms/step" of one
# without a bar (verbose=2).
_TIME_COLUMNS = 15
_TIME_COLUMNS_WITHOUT_BAR = 19

# "      1/Unknown " of an epoch whose steps are not known; it has no bar.
_UNKNOWN_COLUMNS = 16

_CLEAR_TO_END_OF_LINE = "\x1b[K"


class Readable(float):
    """A float that prints as `text` in any format.

    Args:
        value: The number.
        text: How it prints. `None`: as any float.
        end: Text after it.
    """

    def __new__(
        cls, value: float, text: str | None = None, end: str = ""
    ) -> "Readable":
        made = super().__new__(cls, value)
        made.text = text
        made.end = end
        return made

    text: str | None
    end: str

    def __format__(self, spec: str) -> str:
        text = super().__format__(spec) if self.text is None else self.text
        return text + self.end

    def __truediv__(self, other: Any) -> "Readable":
        # Keras divides by the number of values in the mean, which is 1.
        return self


def milliseconds(value: float) -> Readable:
    """A time as `0.13ms`, `3.6ms` or `15ms`; in us or s where that is shorter.

    Args:
        value: Milliseconds.
    """
    if value >= 999.5:
        text = f"{value / 1000:.1f}s"
    elif value >= 9.95:
        text = f"{value:.0f}ms"
    elif value >= 0.995:
        text = f"{value:.1f}ms"
    elif value >= 0.0995:
        text = f"{value:.2f}ms"
    else:
        text = f"{value * 1000:.0f}us"
    return Readable(value, text)


def percent(value: float) -> Readable:
    """A share from 0 to 1 as `52%`."""
    return Readable(value, f"{value:.0%}")


def logged(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What `AllReduceLogger` has put into the logs, as the bar shows it.

    Leaves out values that the bar shows already or that are `nan`.
    """
    names: dict[str, tuple[str, Callable[[float], Readable]]] = {
        "all_reduce_gbps": ("bandwidth", _gigabytes),
        "last_worker": ("last_worker", _whole),
        "lateness_ms": ("lateness", milliseconds),
    }
    shown = {}
    for name, value in logs.items():
        if name in names and not math.isnan(value):
            new_name, readable = names[name]
            shown[new_name] = readable(value)
        elif name not in (*names, "all_reduce_ms", "overlap"):
            shown[name] = value
    return shown


def _gigabytes(value: float) -> Readable:
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return Readable(value, f"{value:.{digits}f}GB/s")


def _whole(value: float) -> Readable:
    return Readable(value, f"{value:.0f}")


def item(name: str, value: Any) -> str:
    """The text of Keras's bar for one of the logs."""
    number = value if isinstance(value, float) else float(np.mean(value))
    return f" - {name}: {number:{'.4f' if abs(number) > 1e-3 else '.4e'}}"


def room(columns: int, target: int | None, logs: Mapping[str, Any]) -> int:
    """Columns left for a bar and more items in a line that is drawn again.

    Args:
        columns: Columns of the terminal.
        target: Steps of the epoch, `None` if not known.
        logs: The items that are in the line.
    """
    count = _UNKNOWN_COLUMNS
    if target is not None:
        count = 2 * len(str(target)) + 2
    items = sum(len(item(name, value)) for name, value in logs.items())
    # The last column stays empty: some terminals wrap when it is written.
    return columns - 1 - count - _TIME_COLUMNS - items


def live(
    logs: Mapping[str, Any],
    ours: Mapping[str, Any],
    columns: int | None,
    target: int | None,
) -> tuple[dict[str, Any], int]:
    """Fits a line that is drawn again and again into a terminal.

    Args:
        logs: Keras's own items.
        ours: Items to be added, the most important one first.
        columns: Columns of the terminal, `None` if the output is none.
        target: Steps of the epoch, `None` if not known.

    Returns:
        The items that fit, and the columns of the bar.
    """
    if columns is None:
        return {**logs, **ours}, BAR_COLUMNS
    shown = dict(logs)
    left = room(columns, target, logs)
    least = 0 if target is None else MIN_BAR_COLUMNS
    for name, value in ours.items():
        if left - len(item(name, value)) < least:
            break
        shown[name] = value
        left -= len(item(name, value))
    return shown, max(MIN_BAR_COLUMNS, min(BAR_COLUMNS, left))


def broken(
    logs: Mapping[str, Any], columns: int | None, target: int, bar: int | None
) -> dict[str, Any]:
    """Breaks a line between items, before the terminal breaks it anywhere.

    Args:
        logs: All items, in order.
        columns: Columns of the terminal, `None` if the output is none.
        target: Steps of the epoch.
        bar: Columns of the bar; `None` for a line without one.

    Returns:
        The logs, with a line break after each item that ends a row.
    """
    if columns is None:
        return dict(logs)
    used = 2 * len(str(target)) + 2
    used += _TIME_COLUMNS_WITHOUT_BAR if bar is None else bar + _TIME_COLUMNS
    rows: dict[str, Any] = {}
    before: str | None = None
    for name, value in logs.items():
        needed = len(item(name, value))
        if before is not None and used + needed > columns - 1:
            last = rows[before]
            rows[before] = Readable(
                float(np.mean(last)),
                getattr(last, "text", None),
                f"{_CLEAR_TO_END_OF_LINE}\n ",
            )
            used = 1
        rows[name] = value
        used += needed
        before = name
    return rows
