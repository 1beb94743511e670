"""How far a worker has come, and the proof that two workers never meet.

A worker waits for the others in three kinds of collectives. Each has a counter,
which goes up when one of its kind begins:

    graph    a collective inside of a `tf.function`, such as a pack of a step
    eager    a sum outside of graphs, such as the result of a metric
    point    a comparison, a barrier or a gather of texts in the store

The three counts are the position of a worker. In a right run all workers begin
the same collectives in the same order, as far as the order is more than chance:
the collectives of one execution of a graph begin in any order, but all of them
are of the one kind `graph`, and Python, which begins the other kinds, goes on
only when the execution has ended. So each position that any worker ever has
lies on one staircase, the same for all, on which no count ever goes down:

    point ^            o - worker 1          Here worker 0 has begun one more
          |      o--o--o                     collective of a graph, and worker 1
          |      |     x - worker 0          one more point. One of them is not
          | o--o-o                           on the staircase of the other: the
          '----------------> graph           sequences differ where they part.

Of two positions of one staircase one is nowhere behind the other. Therefore:

    worker A is ahead in one count and B in another   =>   they differ

That is a proof whenever the positions were read, together or an hour apart,
at any speed of a link, a disk or a callback: it needs no clock. And it is
found. If A waits for a collective that B never begins, B either waits for one
of another kind, in which it is ahead (the two have agreed up to there), or ends
its script, which it says: one that has ended with a lower count anywhere will
never catch up. One that is behind and has not ended is late, for as long as
`timeout_seconds` allows.

Not proven, and ended by `timeout_seconds` alone: two workers that execute
different graphs of their own (two collectives of one execution may begin in any
order, so that no order tells one graph from another), and one that leaves its
loop and neither waits nor ends. Two points of other kinds, such as a barrier
and a comparison, have the same number, meet in the store, and differ there.

The order rests on two things: functions run synchronously, and one thread at a
time drives the strategy. Where a worker sees that this is not so, two positions
prove nothing, and only the end of a script does.
"""

import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf

from keras_allreduce.workers.in_flight import InFlight, Reading
from keras_allreduce.workers.timing import TIMING

STEP = "in a step"
OUTSIDE = "for a sum outside of steps"
COMPARISON = "for the others to begin"

_TRIES = 10


@dataclass(frozen=True)
class Snapshot:
    """How far a worker has come, as it publishes it.

    Attributes:
        position: Collectives of graphs, eager ones and points that have begun.
        call: The call of Keras, such as `"fit, epoch 2 of 5"`; empty outside.
        waits_in: `STEP`, `OUTSIDE` or `COMPARISON`; empty if the worker does
            not wait for others.
        is_ordered: Whether `position` proves anything.
        ended: Whether its script has ended, as it should.
        failure: Class of a `WorkerError` and its message, if it goes on no
            more because of that; the others fail of the same.
        number: Counts how often the worker has published.
    """

    position: tuple[int, int, int] = (0, 0, 0)
    call: str = ""
    waits_in: str = ""
    is_ordered: bool = True
    ended: bool = False
    failure: tuple[str, str] | None = None
    number: int = 0

    def to_json(self) -> str:
        """Returns the text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Snapshot":
        """Reads what `to_json` has written."""
        fields = json.loads(text)
        fields["position"] = tuple(fields["position"])
        if fields["failure"] is not None:
            fields["failure"] = tuple(fields["failure"])
        return cls(**fields)

    def is_behind(self, other: "Snapshot") -> bool:
        """Whether `other` has begun a collective that this one has not."""
        pairs = zip(self.position, other.position, strict=True)
        return any(own < theirs for own, theirs in pairs)

    @property
    def is_last(self) -> bool:
        """Whether the worker publishes nothing after this."""
        return self.ended or self.failure is not None

    def __str__(self) -> str:
        if self.is_last:
            return "has ended its script" if self.ended else "has failed"
        where = f" ({self.call})" if self.call else ""
        if self.waits_in:
            return f"waits {self.waits_in}{where}"
        return f"is at work{where}" if self.call else "is at work elsewhere"


def never_meet(own: Snapshot, other: Snapshot) -> bool:
    """Whether a worker that waits does so in vain: the proof at the top.

    Args:
        own: Of a worker that waits for the others.
        other: Of another worker, read at any time.
    """
    if other.failure is not None:
        return True
    other_is_behind, own_is_behind = other.is_behind(own), own.is_behind(other)
    are_ordered = own.is_ordered and other.is_ordered
    return other_is_behind and (other.ended or (own_is_behind and are_ordered))


class Progress:
    """How far this worker has come in its script.

    Args:
        in_flight: Counts the collectives.
    """

    def __init__(self, in_flight: InFlight):
        self._in_flight = in_flight
        in_flight.on_eager = self._check_order
        self._points = 0
        # In the order in which they have gone on last, by identity.
        self._calls: dict[int, str] = {}
        self._point_since: float | None = None
        self._is_ordered = True

    def begin_call(self, name: str, owner: Any) -> int:
        """Notes that a call of Keras begins.

        Args:
            name: What messages call it.
            owner: The call has ended when this object is gone.

        Returns:
            A number for `rename`.
        """
        number = id(owner)
        self._calls[number] = name
        end = weakref.finalize(owner, self._calls.pop, number, None)
        end.atexit = False
        return number

    def rename(self, number: int, name: str) -> None:
        """Notes how far a call that runs has come."""
        if self._calls.pop(number, None) is not None:
            # The last is the one that has gone on last.
            self._calls[number] = name

    @contextlib.contextmanager
    def point(self) -> Iterator[int]:
        """The next point of the store, at which this worker waits in the block.

        Yields:
            Its number, the same on all workers.
        """
        self._check_order()
        if self._in_flight.runs_eagerly:
            self._is_ordered = False
        number = self._points
        self._points += 1
        self._point_since = self._in_flight.clock()
        try:
            yield number
        finally:
            self._point_since = None

    def snapshot(self) -> Snapshot | None:
        """How far this worker is now; `None` while it does not stand still."""
        for _ in range(_TRIES):
            before = self._of_python()
            # Read while Python begins nothing, it belongs to the same position.
            graphs = self._in_flight.read()
            if before != self._of_python():
                continue
            eager, points, call, point_since, runs_eagerly = before
            return Snapshot(
                (graphs.begun, eager, points),
                call,
                self._waits_in(graphs, point_since, runs_eagerly),
                self._is_ordered,
            )
        return None

    def _of_python(self) -> tuple[int, int, str, float | None, bool]:
        calls = list(dict(self._calls).values())
        return (
            self._in_flight.eager,
            self._points,
            calls[-1] if calls else "",
            self._point_since,
            self._in_flight.runs_eagerly,
        )

    def _waits_in(
        self, graphs: Reading, point_since: float | None, runs_eagerly: bool
    ) -> str:
        seconds = graphs.waiting_seconds
        if point_since is not None:
            seconds = self._in_flight.clock() - point_since
        if seconds < TIMING.waiting:
            return ""
        if point_since is not None:
            return COMPARISON
        return OUTSIDE if runs_eagerly else STEP

    def _check_order(self) -> None:
        """Notes if the order of this worker's collectives may be chance."""
        if (
            self._point_since is not None
            or not tf.config.experimental.get_synchronous_execution()
        ):
            self._is_ordered = False
