"""Numbers of the bar, and lines that fit into a terminal."""

import io
import re

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_allreduce.fit_output import readable

LOGS = {"accuracy": 0.8123, "loss": 0.6689}
VALIDATION = {"val_accuracy": 0.7956, "val_loss": 0.7002}
COST = {
    "all_reduce": readable.milliseconds(3.6459),
    "overlap": readable.percent(0.9098),
}


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0.0, "0us"),
        (0.0131, "13us"),
        (0.1299, "0.13ms"),
        (0.9949, "0.99ms"),
        (0.9951, "1.0ms"),
        (3.6459, "3.6ms"),
        (9.96, "10ms"),
        (812.4, "812ms"),
        (999.6, "1.0s"),
        (12345.0, "12.3s"),
    ],
)
def test_times_have_two_digits_and_a_unit(ms, text):
    assert f"{readable.milliseconds(ms):.4f}" == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.516, "52%"), (1.0, "100%")]
)
def test_shares_are_percentages(share, text):
    assert f"{readable.percent(share):.4e}" == text


def test_a_number_stays_a_number():
    assert readable.milliseconds(3.5) == 3.5
    assert readable.milliseconds(3.5) + 1 == 4.5


def drawn(columns, steps, logs, *, live, validation=()):
    """What Keras's bar writes, without control characters."""
    validation = dict(validation)
    bar = keras.utils.Progbar(steps, stateless_metrics=set(), interval=0)
    written = io.StringIO()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("sys.stdout", written)
        if live:
            shown, bar.width = readable.live(logs, COST, columns, steps)
            bar.update((steps or 9) - 1, list(shown.items()), finalize=False)
        else:
            _, bar.width = readable.live(logs, COST, columns, steps)
            logs = {**logs, **COST, **validation}
            logs = readable.broken(logs, columns, steps, bar.width)
            bar.update(steps, list(logs.items()), finalize=True)
    return re.sub(r"\x1b\[\d*[mK]|[\b\r]", "", written.getvalue())


class TestTheLiveLine:
    def test_without_a_terminal_all_is_there(self):
        line = drawn(None, 57, LOGS, live=True)
        assert line.count("━") == 20
        assert line.endswith("loss: 0.6689 - all_reduce: 3.6ms - overlap: 91%")

    @given(st.integers(60, 200), st.sampled_from([None, 5, 57, 1875]))
    def test_it_never_wraps_because_of_us(self, columns, steps):
        alone = readable.room(columns, steps, LOGS)
        if alone >= readable.MIN_BAR_COLUMNS:
            assert len(drawn(columns, steps, LOGS, live=True)) < columns

    def test_80_columns_hold_one_metric_and_the_cost(self):
        line = drawn(80, 57, LOGS, live=True)
        assert line.endswith(" - loss: 0.6689 - all_reduce: 3.6ms")
        assert line.count("━") == 4

    def test_what_does_not_fit_is_left_out_and_the_bar_is_long_again(self):
        line = drawn(78, 57, LOGS, live=True)
        assert line.endswith(" - loss: 0.6689")
        assert line.count("━") == 20


class TestTheLastLine:
    def test_without_a_terminal_it_is_one_line(self):
        line = drawn(None, 57, LOGS, live=False, validation=VALIDATION)
        assert line.count("\n") == 1
        assert line.endswith(
            "- overlap: 91% - val_accuracy: 0.7956 - val_loss: 0.7002\n"
        )

    def test_80_columns_hold_one_metric_and_validation_in_two_rows(self):
        text = drawn(80, 57, LOGS, live=False, validation=VALIDATION)
        first, second = text.splitlines()
        assert first.endswith(" - loss: 0.6689 - all_reduce: 3.6ms")
        assert second == (
            "  - overlap: 91% - val_accuracy: 0.7956 - val_loss: 0.7002"
        )
        assert len(first) < 80

    @given(st.integers(60, 200))
    def test_no_row_wraps(self, columns):
        text = drawn(columns, 57, LOGS, live=False, validation=VALIDATION)
        assert max(map(len, text.splitlines())) < columns
        assert text.count(" - ") == 6

    def test_a_line_without_a_bar_is_broken_too(self):
        rows = readable.broken({**LOGS, **COST, **VALIDATION}, 80, 57, None)
        ends = [
            name
            for name, value in rows.items()
            if hasattr(value, "end") and value.end
        ]
        assert ends == ["all_reduce"]


class TestWhatTheLoggerAdds:
    def test_it_is_not_repeated_and_has_units(self):
        logs = {
            "loss": 0.5,
            "all_reduce_ms": 3.6,
            "overlap": 0.9,
            "all_reduce_gbps": 1.234,
            "last_worker": 1,
            "lateness_ms": 12.34,
        }
        shown = readable.logged(logs)
        assert [f"{name}: {value:.4f}" for name, value in shown.items()] == [
            "loss: 0.5000",
            "bandwidth: 1.2GB/s",
            "last_worker: 1",
            "lateness: 12ms",
        ]

    def test_what_is_not_known_is_not_shown(self):
        nan = float("nan")
        logs = {"loss": nan, "all_reduce_gbps": nan, "lateness_ms": nan}
        assert list(readable.logged(logs)) == ["loss"]
