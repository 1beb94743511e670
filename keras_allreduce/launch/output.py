"""The output of all workers on one screen, the progress bar once."""

import codecs
import io
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

Clean: TypeAlias = Callable[[str], str | None]
"""Returns the visible text of a line, or `None`."""

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")

# Progress bars of Keras with verbose=1 and verbose=2:
#    12/45 ━━━━━━━━━━━━━━━━━━━━ 1s 12ms/step - loss: 1.2203
#   7/Unknown 1s 12ms/step - loss: 1.2203
#   45/45 - 1s - 12ms/step - loss: 1.2203
# with "=" where the encoding of the output has no "━", and the cost of the
# all-reduce:  - all_reduce: 3.6ms - overlap: 91%
# The line of a table in `model.summary()` has "━" too, and is no bar.
_BAR = re.compile(
    r"\s*\d+/(?:\d+|Unknown) [━= -]*"
    r"(?:\d+s|\d+(?::\d\d)+) (?:- )?\d+[mu]?s/[a-z]+"
    r"(?: - (?:[^:]+: (?:-?\d+\.\d{4}(?:e[+-]\d+)?|-?inf|nan"
    r"|\d+(?:\.\d+)?(?:[mu]?s|%|GB/s))|last_worker: \d+))*"
)
_BAR_HEADING = re.compile(r"Epoch \d+/\d+\s*$")


def visible(line: str) -> str:
    """The visible text of a line that overwrites itself."""
    return _after_last_return(line).strip("\r").replace("\b", "")


def visible_without_bar(line: str) -> str | None:
    """The same without the Keras progress bar and the heading above it.

    Args:
        line: Line without its end.

    Returns:
        The rest of the line; `None` if it is empty. A script that prints in the
        middle of an epoch prints behind the bar: that is kept.
    """
    shown = visible(line)
    plain = _ANSI.sub("", shown)
    if _BAR_HEADING.match(plain):
        return None
    bar = _BAR.match(plain)
    if bar is None:
        return shown
    return plain[bar.end() :].strip() or None


def tag(index: int) -> str:
    """The prefix of each line of a worker."""
    return f"[worker {index}] "


class LineReader:
    """Makes lines of the bytes of one pipe.

    Args:
        clean: Returns the visible text of a line.
    """

    def __init__(self, clean: Clean):
        self._clean = clean
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """Returns the lines that `data` completes, without their ends."""
        *lines, rest = (self._rest + self._decode.decode(data)).split("\n")
        # A bar overwrites itself all through an epoch: only its last state
        # is kept.
        self._rest = _after_last_return(rest)
        return self._shown(lines)

    def close(self) -> list[str]:
        """Returns the last line, if it had no end."""
        rest = self._rest + self._decode.decode(b"", final=True)
        self._rest = ""
        return self._shown([rest] if rest else [])

    @property
    def unfinished(self) -> str:
        """The visible text of the unfinished line, or an empty string."""
        return (self._clean(self._rest) if self._rest else None) or ""

    def _shown(self, lines: Sequence[str]) -> list[str]:
        cleaned = (self._clean(line) for line in lines)
        return [line for line in cleaned if line is not None]


class Screen:
    """Standard output and error, shared by threads; whole lines only.

    On a terminal the unfinished line of the chief, its progress bar, stays
    below the lines of all. Output that no one can read any more (a closed
    pipe) is dropped: training goes on.

    Args:
        out: Unbuffered standard output.
        err: Unbuffered standard error.
    """

    def __init__(self, out: io.RawIOBase, err: io.RawIOBase):
        self.out = out
        self.err = err
        self._lock = threading.Lock()
        self._is_live = out.isatty()
        self._status = ""

    @property
    def columns(self) -> int | None:
        """Columns of the terminal; `None` for a file or a pipe."""
        if not self._is_live:
            return None
        return shutil.get_terminal_size((0, 0)).columns or None

    def write(
        self, stream: io.RawIOBase, lines: Sequence[str], status: str | None
    ) -> None:
        """Writes lines.

        Args:
            stream: `out` or `err`.
            lines: Lines without their ends.
            status: The new unfinished line; `None`: it is as it was.
        """
        with self._lock:
            if self._status:
                _write_all(self.out, "\r\x1b[K")
            _write_all(stream, "".join(f"{line}\n" for line in lines))
            if status is not None and self._is_live:
                self._status = _cut(status)
            if self._status:
                _write_all(self.out, self._status)


def _after_last_return(line: str) -> str:
    # A return at the very end overwrites nothing yet.
    return line[line.rstrip("\r").rfind("\r") + 1 :]


def _cut(line: str) -> str:
    # A line of two rows could not be overwritten.
    columns = shutil.get_terminal_size().columns
    plain = _ANSI.sub("", line)
    return line if len(plain) < columns else plain[: columns - 1]


def _write_all(stream: io.RawIOBase, text: str) -> None:
    data = memoryview(text.encode("utf-8", "surrogateescape"))
    try:
        while data:
            data = data[stream.write(data) or 0 :]
    except OSError:
        return
