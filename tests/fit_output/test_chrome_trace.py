"""Timelines of steps that were drawn by hand."""

import gzip
import json
import math

import pytest

from keras_allreduce.fit_output import chrome_trace
from keras_allreduce.fit_output.recording import (
    Call,
    Clock,
    PackLabel,
    StepTimes,
    WorkerTimeline,
    clock_of,
)

NAN = math.nan
LAST = PackLabel(("dense_1",), 40, "float32")
FIRST = PackLabel(("embed",), None, "float32", sparse=True)

# time in ms  0    1    2    3    4    5    6    7    8    9   10
# replica 0   |inp.|forward and backprop|1   |exposed  |update  |
# replica 1   |input    |forward and backp.  |exposed  |up. |
# pack 0                     |wait |====|
# pack 1                                     |=========|
STEP = StepTimes(
    number=7,
    packs=[LAST, FIRST],
    ready=[[0.0025, 0.005], [0.003, 0.006]],
    done=[[0.004, 0.008], [0.004, 0.008]],
    marks=[[0.0, 0.001, 0.010], [0.0, 0.002, 0.009]],
)


def moved(step, seconds, number=7):
    def move(rows):
        return [[time + seconds for time in row] for row in rows]

    return StepTimes(
        number, step.packs, move(step.ready), move(step.done), move(step.marks)
    )


def worker(index=0, steps=(STEP,), **more):
    return WorkerTimeline(index, ["CPU:0", "CPU:1"], list(steps), **more)


def slices(trace, pid=0):
    """`[row, name, start, end]` of all slices, in ms."""
    return [
        [
            event["tid"],
            event["name"],
            event["ts"] / 1e3,
            round((event["ts"] + event["dur"]) / 1e3, 4),
        ]
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event["pid"] == pid
    ]


def names(trace, pid=0):
    return {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name" and event["pid"] == pid
    }


def test_a_step_of_one_worker_is_drawn_as_above():
    trace = chrome_trace.trace([worker()])
    assert slices(trace) == [
        [0, "step 7", 0, 10],
        [1, "wait for input", 0, 1],
        [1, "forward and backprop", 1, 5],
        [1, "wait for replica 1", 5, 6],
        [1, "all-reduce, exposed", 6, 8],
        [1, "update", 8, 10],
        [2, "wait for input", 0, 2],
        [2, "forward and backprop", 2, 6],
        [2, "all-reduce, exposed", 6, 8],
        [2, "update", 8, 9],
        [1000, "pack 0: dense_1", 3, 4],
        [1000, "pack 1: embed", 6, 8],
    ]
    assert names(trace) == {
        0: "steps",
        1: "replica 0 (CPU:0)",
        2: "replica 1 (CPU:1)",
        1000: "packs",
    }


def test_a_pack_says_what_it_carries():
    trace = chrome_trace.trace([worker()])
    packs = [e["args"] for e in trace["traceEvents"] if e["tid"] == 1000]
    assert packs[:2] == [
        {
            "step": 7,
            "layers": ["dense_1"],
            "bytes": 40,
            "size": "0.0 KiB",
            "dtype": "float32",
            "sparse": False,
        },
        {
            "step": 7,
            "layers": ["embed"],
            "bytes": None,
            "size": "?",
            "dtype": "float32",
            "sparse": True,
        },
    ]


def test_packs_in_flight_at_once_have_rows_of_their_own():
    step = StepTimes(
        0,
        [LAST, LAST, LAST],
        [[0.0, 1.0, 3.0]],
        [[2.0, 3.0, 4.0]],
        [[NAN, NAN, NAN]],
    )
    timeline = WorkerTimeline(0, ["CPU:0"], [step])
    trace = chrome_trace.trace([timeline])
    packs = [row for row in slices(trace) if row[0] >= 1000]
    assert [row[0] for row in packs] == [1000, 1001, 1000]
    assert names(trace)[1001] == "packs 1"


def test_what_is_not_known_is_left_out():
    step = moved(STEP, 0)
    unknown = StepTimes(
        7, step.packs, step.ready, step.done, [[NAN] * 3, [NAN] * 3]
    )
    trace = chrome_trace.trace([worker(steps=[unknown])])
    assert [name for _, name, *_ in slices(trace)] == [
        "step 7",
        "wait for replica 1",
        "all-reduce, exposed",
        "all-reduce, exposed",
        "pack 0: dense_1",
        "pack 1: embed",
    ]


def test_an_input_clock_that_runs_late_hides_nothing():
    late = StepTimes(
        7,
        STEP.packs,
        STEP.ready,
        STEP.done,
        [[0.0, 0.0055, 0.010], [0.0, 0.0065, 0.009]],
    )
    drawn = slices(chrome_trace.trace([worker(steps=[late])]))
    assert [1, "forward and backprop", 2.5, 5] in drawn
    assert [2, "forward and backprop", 3, 6] in drawn


def test_steps_and_epochs_are_marked_where_keras_has_them():
    calls = [
        Call(6, 1, False, -0.02, -0.01),
        Call(7, 2, True, -0.001, 0.011),
    ]
    trace = chrome_trace.trace([worker(calls=calls)])
    assert slices(trace)[:2] == [[0, "step 6", 0, 10], [0, "step 7", 19, 31]]
    (epoch,) = [e for e in trace["traceEvents"] if e["ph"] == "i"]
    assert (epoch["name"], epoch["ts"], epoch["s"]) == ("epoch 2", 19_000, "g")


class TestWorkers:
    def test_all_are_on_the_clock_of_the_chief(self):
        # Worker 1 is 2 ms later, by a clock that is 100 s ahead.
        chief = worker(meetings=[(0.0, 0.001)])
        other = worker(1, [moved(STEP, 100.002)], meetings=[(100.0, 100.001)])
        trace = chrome_trace.trace([chief, other])
        assert [1, "forward and backprop", 3, 7] in slices(trace, 1)
        assert trace["otherData"]["clock_error_ms"] == [0.0, pytest.approx(1)]

    def test_who_is_waited_for_is_named(self):
        meetings = [(0.0, 0.0)]
        chief = worker(meetings=meetings)
        other = worker(1, [moved(STEP, 0.0015)], meetings=meetings)
        drawn = slices(chrome_trace.trace([chief, other]))
        assert [2, "wait for worker 1", 6, 7.5] in drawn
        assert [2, "all-reduce, exposed", 7.5, 8] in drawn
        assert [1000, "wait for worker 1", 6, 7.5] in drawn
        assert [1000, "wait for worker 1", 3, 4] in drawn  # Its end at most.
        late = slices(chrome_trace.trace([chief, other]), 1)
        assert not [name for _, name, *_ in late if "worker" in name]

    def test_nobody_is_blamed_within_the_error_of_the_clocks(self):
        meetings = [(0.0, 0.004)]
        chief = worker(meetings=meetings)
        other = worker(1, [moved(STEP, 0.0015)], meetings=meetings)
        drawn = slices(chrome_trace.trace([chief, other]))
        assert not [name for _, name, *_ in drawn if "worker" in name]

    def test_the_chief_reads_what_another_has_sent(self):
        calls = [Call(7, 2, True, 1.0, 2.0)]
        sent = worker(1, calls=calls, meetings=[(1.0, 2.0)])
        assert WorkerTimeline.loads(sent.dumps()) == sent


class TestClocks:
    def test_limits_of_all_meetings_count(self):
        # At least 5 - 2 and 10 - 8 ahead, at most 6 - 1 and 14.5 - 7.
        clock = clock_of([(5, 6), (10, 14.5)], [(1, 2), (7, 8)])
        assert clock == Clock(ahead=4.0, error=1.0)

    def test_no_true_offset_is_outside_the_error(self):
        # Both leave when the last one has entered, and messages take a while.
        for ahead in (-3.0, 0.0, 7.5):
            chief, other = [], []
            for number in range(5):
                begin = 10.0 * number
                one, two = begin + number % 3, begin + (number * 2) % 5
                met = max(one, two)
                chief.append((one, met + 0.25 * number))
                other.append((two + ahead, met + 0.5 + ahead))
            clock = clock_of(other, chief)
            assert abs(clock.ahead - ahead) <= clock.error

    def test_alone_there_is_nothing_to_compare(self):
        assert clock_of([], []) == Clock(0.0, 0.0)


class TestTheFile:
    @pytest.mark.parametrize("name", ["a.json", "new/folder/a.trace.json.gz"])
    def test_it_is_json_that_a_viewer_reads(self, tmp_path, name):
        path = tmp_path / name
        trace = chrome_trace.trace([worker()])
        chrome_trace.write(path, trace)
        opened = gzip.open if name.endswith("gz") else open
        with opened(path, "rt") as file:
            read = json.load(file)
        assert read == trace
        assert read["displayTimeUnit"] == "ms"
        for event in read["traceEvents"]:
            assert event["ph"] in "XMi"
            assert isinstance(event["pid"], int)
            assert isinstance(event["tid"], int)
            if event["ph"] == "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0

    def test_slices_of_a_row_never_cut_each_other(self):
        steps = [moved(STEP, 0.012 * n, n) for n in range(5)]
        meetings = [(0.0, 0.0)]
        other = worker(
            1, [moved(s, 0.0015, s.number) for s in steps], meetings=meetings
        )
        trace = chrome_trace.trace(
            [worker(steps=steps, meetings=meetings), other]
        )
        for pid in (0, 1):
            rows = {}
            for row, _, start, end in slices(trace, pid):
                rows.setdefault(row, []).append((start, end))
            for spans in rows.values():
                for a in spans:
                    for b in spans:
                        apart = a[1] <= b[0] or b[1] <= a[0]
                        inside = (a[0] <= b[0] and b[1] <= a[1]) or (
                            b[0] <= a[0] and a[1] <= b[1]
                        )
                        assert apart or inside
