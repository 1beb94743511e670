"""Lines of several workers, of which one shows the progress bar."""

import io

import pytest

from keras_allreduce.launch.output import (
    LineReader,
    Screen,
    visible,
    visible_without_bar,
)

# As Keras 3 writes it.
HALF = "\r\x1b[1m1/4\x1b[0m \x1b[32m━━━━━\x1b[0m\x1b[37m━━━━━━━━━━━━━━━\x1b[0m"
HALF_BAR = f"{HALF} \x1b[1m0s\x1b[0m 212ms/step - loss: 4.3463"
WHOLE = "\x1b[1m4/4\x1b[0m \x1b[32m━━━━━━━━━━━━━━━━━━━━\x1b[0m\x1b[37m\x1b[0m"
WHOLE_BAR = f"{WHOLE} \x1b[1m0s\x1b[0m 5ms/step - loss: 1.7673 "

BARS = {
    "live": HALF_BAR,
    "whole": WHOLE_BAR,
    "without metrics": f"{WHOLE} \x1b[1m0s\x1b[0m 23ms/step",
    "small metric": f"{WHOLE_BAR}- val_loss: -9.1000e-05",
    "not a number": "4/4 ━━━━━━━━━━━━━━━━━━━━ 0s 5ms/step - loss: nan",
    "cost of the all-reduce": (
        "45/45 ━━━━━━━━━━━━━━━━━━━━ 1s 12ms/step - accuracy: 0.6100 - "
        "loss: 1.2200 - all_reduce: 0.41ms - overlap: 83%"
    ),
    "cost in other units": (
        "45/45 - 1s - 12ms/step - loss: 1.2200 - all_reduce: 13us - "
        "overlap: 0% - val_loss: 1.2345e-05"
    ),
    "what a logger adds": (
        "45/45 - 1s - 12ms/step - loss: 1.2200 - bandwidth: 0.41GB/s - "
        "last_worker: 1 - lateness: 12ms - all_reduce: 1.2s - overlap: 7%"
    ),
    "unknown length": "\r      1/Unknown \x1b[1m0s\x1b[0m 127ms/step",
    "hours to go": "1/9 ━━━━ 1:02:03 12s/step - loss: 0.3000",
    "microseconds": "9/9 ━━━━ 0s 12us/step",
    "one line per epoch": "4/4 - 0s - 39ms/step - loss: 0.4655",
    "not in UTF-8": "4/4 ==================== 0s 5ms/step",
    "heading": "Epoch 1/12",
}


@pytest.mark.parametrize("line", BARS.values(), ids=BARS)
def test_a_bar_is_dropped(line):
    assert visible_without_bar(line) is None


KEPT = [
    "",
    "loss: 0.25 after 3/4 of the data",
    "Epoch 5: early stopping",
    "Epoch 1/3 begins",
    "┏━━━━━━━━━━━━┳━━━━━━━━━━┓",
    "3/4 tests passed in 2s",
    "  indented",
]


@pytest.mark.parametrize("line", KEPT)
def test_any_other_line_is_kept_as_it_is(line):
    assert visible_without_bar(line) == line


def test_what_a_script_prints_behind_the_bar_is_kept():
    assert visible_without_bar(f"{HALF_BAR}hello 1") == "hello 1"
    assert visible_without_bar(f"{HALF_BAR}5 more") == "5 more"


def test_a_line_that_overwrites_itself_shows_its_last_state():
    assert visible("10%\r20%\b\b\b\r30%\r") == "30%"
    assert visible("windows\r") == "windows"


def test_lines_come_in_whatever_pieces_the_bytes_come():
    reader = LineReader(visible)
    data = "grün\nzwei\r\n\ndrei".encode()
    lines = [line for byte in data for line in reader.feed(bytes([byte]))]
    assert lines == ["grün", "zwei", ""]
    assert reader.unfinished == "drei"
    assert reader.close() == ["drei"]
    assert reader.close() == []


def test_a_bar_does_not_grow_over_an_epoch():
    reader = LineReader(visible)
    for _ in range(1000):
        assert reader.feed(f"\b\b\b{HALF_BAR}".encode()) == []
    assert reader.unfinished == HALF_BAR[1:]
    assert reader.feed(f"\b\b\b\r{WHOLE_BAR}\n".encode()) == [WHOLE_BAR]


def test_the_bar_of_another_worker_is_no_unfinished_line():
    reader = LineReader(visible_without_bar)
    assert reader.feed(HALF_BAR.encode()) == []
    assert reader.unfinished == ""
    assert reader.close() == []


class Terminal(io.BytesIO):
    def isatty(self):
        return True


class ClosedPipe(io.BytesIO):
    def write(self, data):
        raise BrokenPipeError


class OneByteAtATime(io.BytesIO):
    def write(self, data):
        return super().write(data[:1])


def test_bytes_that_are_not_utf8_come_out_as_they_went_in():
    reader, out = LineReader(visible), io.BytesIO()
    Screen(out, io.BytesIO()).write(out, reader.feed(b"\xff\xfe\n"), None)
    assert out.getvalue() == b"\xff\xfe\n"


def test_into_a_file_only_whole_lines_go():
    out, err = io.BytesIO(), io.BytesIO()
    screen = Screen(out, err)
    screen.write(out, ["a"], "half a bar")
    screen.write(err, ["b"], None)
    assert out.getvalue() == b"a\n"
    assert err.getvalue() == b"b\n"


def test_on_a_terminal_the_bar_stays_below_the_lines():
    out = Terminal()
    screen = Screen(out, out)
    screen.write(out, [], "bar 1")
    screen.write(out, ["a line"], None)
    screen.write(out, ["the end"], "")
    screen.write(out, ["more"], None)
    clear = "\r\x1b[K"
    assert out.getvalue().decode() == (
        f"bar 1{clear}a line\nbar 1{clear}the end\nmore\n"
    )


def test_a_bar_is_cut_to_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    out = Terminal()
    Screen(out, out).write(out, [], "\x1b[1m0123456789\x1b[0m")
    assert out.getvalue() == b"012345678"


def test_a_screen_that_no_one_reads_stops_nothing():
    out = ClosedPipe()
    Screen(out, out).write(out, ["a"], None)


def test_a_write_that_is_cut_short_goes_on():
    out = OneByteAtATime()
    Screen(out, out).write(out, ["abc"], None)
    assert out.getvalue() == b"abc\n"


def test_a_screen_has_columns_if_it_is_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert Screen(Terminal(), io.BytesIO()).columns == 80
    assert Screen(io.BytesIO(), io.BytesIO()).columns is None
