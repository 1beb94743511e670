"""For how many columns a line of the fit output is broken."""

import io
import os

import pytest

from keras_allreduce.fit_output import progress_bar

NO_SIZE, WIDE = os.terminal_size((0, 0)), os.terminal_size((132, 24))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stdout", "size", "environment", "columns"),
    [
        (io.StringIO(), WIDE, {}, None),
        (io.StringIO(), WIDE, {"COLUMNS": "70"}, None),
        (Terminal(), WIDE, {}, 132),
        (Terminal(), WIDE, {"COLUMNS": "70"}, 70),
        (Terminal(), NO_SIZE, {}, None),
        (io.StringIO(), WIDE, {"KERAS_ALLREDUCE_COLUMNS": "69"}, 69),
    ],
    ids=[
        "a file",
        "a file, started in a terminal",
        "a terminal",
        "a terminal that is told",
        "what mpirun makes",
        "a pipe to the launcher",
    ],
)
def test_lines_are_broken_for_the_terminal_that_shows_them(
    stdout, size, environment, columns, monkeypatch
):
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: size)
    for name in ("COLUMNS", "KERAS_ALLREDUCE_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert progress_bar._columns() == columns
