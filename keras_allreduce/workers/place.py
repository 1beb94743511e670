"""Says where in its script a worker is, and whether two wait for each other.

    worker 0                        worker 1
    waits in a step         <-->    waits for a sum outside of steps
    waits in a comparison   <-->    waits in a step
    waits                   <-->    has ended its script
    waits                   <-->    has failed

Each of these pairs waits for ever. A worker that only waits for one that is
late does not: that one does not wait.
"""

import json
from dataclasses import asdict, dataclass

STEP = "in a step"
OUTSIDE = "for a sum outside of steps"
COMPARISON = "for the others to begin"


@dataclass(frozen=True)
class Place:
    """Where in its script a worker is.

    Attributes:
        call: The call of Keras, such as `"fit, epoch 2 of 5"`; empty outside.
        calls: Numbers of the calls that run, the innermost last; the same on
            all workers.
        begun: Number of the last call that has begun.
        waits_in: `STEP`, `OUTSIDE` or `COMPARISON`; empty if the worker does
            not wait for others.
        ended: Whether its script has ended, as it should.
        saw_chief_end: Whether it knows that the chief's has, or has failed.
        failure: Name of a `WorkerError` and its message, if it goes on no more
            because of that; the others fail of the same.
        beat: Counts how often the place was published.
    """

    call: str = ""
    calls: tuple[int, ...] = ()
    begun: int = 0
    waits_in: str = ""
    ended: bool = False
    saw_chief_end: bool = False
    failure: tuple[str, str] | None = None
    beat: int = 0

    def to_json(self) -> str:
        """Returns the text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Place":
        """Reads what `to_json` has written."""
        fields = json.loads(text)
        fields["calls"] = tuple(fields["calls"])
        if fields["failure"] is not None:
            fields["failure"] = tuple(fields["failure"])
        return cls(**fields)

    @property
    def is_last(self) -> bool:
        """Whether the worker publishes no other place after this one."""
        return self.ended or self.failure is not None

    def __str__(self) -> str:
        if self.is_last:
            return "has ended its script" if self.ended else "has failed"
        where = f" ({self.call})" if self.call else ""
        if self.waits_in:
            return f"waits {self.waits_in}{where}"
        return f"is at work{where}" if self.call else "is at work elsewhere"


def never_meet(own: Place, other: Place) -> bool:
    """Whether a worker that waits does so in vain.

    Args:
        own: Place of a worker that waits for the others.
        other: Place of another, later than that.
    """
    if other.is_last:
        return True
    if other.waits_in and other.waits_in != own.waits_in:
        return True
    return _has_left(own, other)


def _has_left(own: Place, other: Place) -> bool:
    """Whether `other` has ended the call of Keras that `own` is in."""
    if not own.calls:
        return False
    innermost = own.calls[-1]
    return other.begun >= innermost and innermost not in other.calls
