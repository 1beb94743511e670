"""Draws steps as a Chrome trace; arithmetic alone, no TensorFlow.

One process of the trace is a worker. Its rows, for two replicas:

    steps      |step 7 -------------------------------------| |step 8 ---
    replica 0  |input|forward and backprop--|1|exposed-|update|
    replica 1  |input|forward and backprop----|exposed-|update|
    packs           |pack 0-----|  |pack 2-------------|
                         |pack 1------------|

Replica 0 waits for replica 1 where it says "1", and all replicas of a worker
wait for the last worker in the same way, on the clock of the chief.

Format: "Trace Event Format", as Perfetto and chrome://tracing read it.
"""

import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from keras_allreduce.fit_output.recording import (
    Clock,
    StepTimes,
    WorkerTimeline,
    clock_of,
)
from keras_allreduce.reduce.plan import size_of

_STEPS, _REPLICAS, _PACKS = 0, 1, 1000
"""Numbers of the rows: steps, the first replica, the first row of packs."""


def trace(timelines: Sequence[WorkerTimeline]) -> dict[str, Any]:
    """Draws all workers on the clock of the first one, the chief.

    Args:
        timelines: The recording of each worker.

    Returns:
        The trace, to be written as JSON. Times are in microseconds since the
        earliest one.
    """
    chief = timelines[0]
    clocks = [
        Clock() if each is chief else clock_of(each.meetings, chief.meetings)
        for each in timelines
    ]
    moved = [
        _on_clock_of_chief(timeline, clock)
        for timeline, clock in zip(timelines, clocks, strict=True)
    ]
    ready = _ready_of_workers(moved)
    error = max(clock.error for clock in clocks)
    events: list[dict[str, Any]] = []
    for timeline, clock in zip(moved, clocks, strict=True):
        events += _worker(timeline, clock, ready, error)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "started": _count_from_the_earliest(events),
            "clock_error_ms": [clock.error * 1e3 for clock in clocks],
        },
    }


def _count_from_the_earliest(events: Sequence[dict[str, Any]]) -> float:
    """Turns seconds into microseconds since the earliest, which it returns."""
    timed = [event for event in events if "ts" in event]
    start = min((event["ts"] for event in timed), default=0.0)
    for event in timed:
        begin = event["ts"] - start
        event["ts"] = round(begin * 1e6, 1)
        if "dur" in event:
            # So that one that ends where the next begins still does.
            end = round((begin + event["dur"]) * 1e6, 1)
            event["dur"] = round(end - event["ts"], 1)
    return start


def _on_clock_of_chief(
    timeline: WorkerTimeline, clock: Clock
) -> WorkerTimeline:
    def moved(rows: Sequence[Sequence[float]]) -> list[list[float]]:
        return [[time - clock.ahead for time in row] for row in rows]

    steps = [
        replace(
            step,
            ready=moved(step.ready),
            done=moved(step.done),
            marks=moved(step.marks),
        )
        for step in timeline.steps
    ]
    calls = [
        replace(
            call, begin=call.begin - clock.ahead, end=call.end - clock.ahead
        )
        for call in timeline.calls
    ]
    return replace(timeline, steps=steps, calls=calls)


_Ready = dict[tuple[int, int], dict[int, float]]


def _ready_of_workers(timelines: Iterable[WorkerTimeline]) -> _Ready:
    """`ready[step, pack][worker]`: a pack is there, on the last replica."""
    ready: _Ready = {}
    for timeline in timelines:
        for step in timeline.steps:
            for pack, time in enumerate(_latest(step.ready)):
                at = ready.setdefault((step.number, pack), {})
                at[timeline.worker] = time
    return ready


def _latest(rows: Sequence[Sequence[float]]) -> list[float]:
    return [max(times) for times in zip(*rows, strict=True)]


def _worker(
    timeline: WorkerTimeline, clock: Clock, ready: _Ready, error: float
) -> Iterator[dict[str, Any]]:
    pid = timeline.worker
    name = f"worker {pid}"
    if clock.error:
        name += f" (clock within {clock.error * 1e3:.2f} ms of the chief's)"
    yield _name("process_name", pid, 0, name)
    yield _name("thread_name", pid, _STEPS, "steps")
    for replica, device in enumerate(timeline.devices):
        row = _REPLICAS + replica
        yield _name("thread_name", pid, row, f"replica {replica} ({device})")
    yield from _calls(timeline)
    lanes: list[float] = []
    for step in timeline.steps:
        yield from _replicas(pid, step, ready, error)
        yield from _packs(pid, step, lanes, ready, error)
    for lane in range(len(lanes)):
        name = f"packs {lane}" if lane else "packs"
        yield _name("thread_name", pid, _PACKS + lane, name)


def _calls(timeline: WorkerTimeline) -> Iterator[dict[str, Any]]:
    pid = timeline.worker
    for call in timeline.calls:
        yield _slice(
            pid,
            _STEPS,
            f"step {call.number}",
            call.begin,
            call.end,
            epoch=call.epoch,
        )
        if call.first and not pid:
            yield {
                "name": f"epoch {call.epoch}",
                "ph": "i",
                "s": "g",
                "pid": pid,
                "tid": _STEPS,
                "ts": call.begin,
            }
    if timeline.calls:
        return
    for step in timeline.steps:
        known = [t for row in step.marks for t in row if not math.isnan(t)]
        known += [t for row in (*step.ready, *step.done) for t in row]
        name = f"step {step.number}"
        yield _slice(pid, _STEPS, name, min(known), max(known))


def _replicas(
    pid: int, step: StepTimes, ready: _Ready, error: float
) -> Iterator[dict[str, Any]]:
    backprop = [max(times) for times in step.ready]
    last = max(backprop)
    everywhere, worker = _last_worker(step, ready)
    if everywhere - last <= error:
        everywhere = last
    for replica, (begun, given, ended) in enumerate(step.marks):
        # A clock may run late. But the input was there before a gradient, and
        # all was written after the last result.
        given = min(given, *step.ready[replica])
        back = max(everywhere, *step.done[replica])
        ended = max(ended, back)
        for name, start, end in (
            ("wait for input", begun, given),
            ("forward and backprop", given, backprop[replica]),
            (
                f"wait for replica {backprop.index(last)}",
                backprop[replica],
                last,
            ),
            (f"wait for worker {worker}", last, everywhere),
            ("all-reduce, exposed", everywhere, back),
            ("update", back, ended),
        ):
            works = name in ("forward and backprop", "update")
            # Not if one of them is not known (`nan`).
            if end > start or (works and end == start):
                yield _slice(
                    pid,
                    _REPLICAS + replica,
                    name,
                    start,
                    end,
                    step=step.number,
                )


def _last_worker(step: StepTimes, ready: _Ready) -> tuple[float, int]:
    """When all gradients of a step were there, and the worker that was last."""
    return max(
        (time, worker)
        for pack in range(len(step.packs))
        for worker, time in ready[step.number, pack].items()
    )


def _packs(
    pid: int,
    step: StepTimes,
    lanes: list[float],
    ready: _Ready,
    error: float,
) -> Iterator[dict[str, Any]]:
    starts, ends = _latest(step.ready), _latest(step.done)
    for pack in sorted(range(len(starts)), key=lambda pack: starts[pack]):
        label, start = step.packs[pack], starts[pack]
        end = max(start, ends[pack])
        row = _PACKS + _free_lane(lanes, start, end)
        size = "?" if label.nbytes is None else size_of(label.nbytes)
        yield _slice(
            pid,
            row,
            f"pack {pack}: {', '.join(label.layers)}",
            start,
            end,
            step=step.number,
            layers=list(label.layers),
            bytes=label.nbytes,
            size=size,
            dtype=label.dtype,
            sparse=label.sparse,
        )
        others = ready[step.number, pack]
        last = max(others, key=lambda worker: others[worker])
        if others[last] - start > error:
            yield _slice(
                pid,
                row,
                f"wait for worker {last}",
                start,
                min(others[last], end),
                step=step.number,
            )


def _free_lane(lanes: list[float], start: float, end: float) -> int:
    """The first row that is free from `start` on; taken until `end`."""
    for lane, free in enumerate(lanes):
        if free <= start:
            lanes[lane] = end
            return lane
    lanes.append(end)
    return len(lanes) - 1


def _slice(
    pid: int, tid: int, name: str, start: float, end: float, **details: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": end - start,
        "args": details,
    }


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {
        "name": kind,
        "ph": "M",
        "pid": pid,
        "tid": tid,
        "args": {"name": name},
    }


def write(path: str | os.PathLike[str], drawn: dict[str, Any]) -> None:
    """Writes a trace.

    Args:
        path: The file of JSON; compressed if it ends in `.gz`.
        drawn: What `trace` returned.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8") as text:
        json.dump(drawn, text, allow_nan=False)
