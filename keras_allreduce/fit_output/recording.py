"""Records of each worker for a timeline, and the offset of its clock.

No TensorFlow: workers send this to the chief as text.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PackLabel:
    """The content of one pack.

    Attributes:
        layers: Paths of the layers, in the order of backprop.
        nbytes: Its size, `None` if not known.
        dtype: Its dtype.
        sparse: Whether it is rows that are gathered.
    """

    layers: tuple[str, ...]
    nbytes: int | None
    dtype: str
    sparse: bool = False


def names_in_pack(
    paths: Sequence[str], indices: Sequence[int]
) -> tuple[str, ...]:
    """Names the layers and variables whose gradients a pack carries.

    Args:
        paths: Paths of all variables, such as `"sequential/dense/kernel"`.
        indices: Those in the pack, in the order of backprop.

    Returns:
        In that order, the path of a layer if all its variables are in the
        pack, and else the paths of the variables.
    """
    layers = [path.rpartition("/")[0] for path in paths]
    has = Counter(layers)
    here = Counter(layers[index] for index in indices)
    names = [
        layers[index]
        if layers[index] and here[layers[index]] == has[layers[index]]
        else paths[index]
        for index in indices
    ]
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class StepTimes:
    """Times of one step on one worker, in seconds since the epoch.

    Attributes:
        number: Its number.
        packs: The packs of the step.
        ready: `ready[replica][pack]`, its last gradient was there.
        done: `done[replica][pack]`, its result was.
        marks: `marks[replica]`: the step had begun, its input was there, all
            that it writes was written; `nan` if not known.
    """

    number: int
    packs: Sequence[PackLabel]
    ready: Sequence[Sequence[float]]
    done: Sequence[Sequence[float]]
    marks: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Call:
    """One call of the train function, as Keras's callbacks see it.

    Attributes:
        number: Number of its first step, counted from the begin of `fit`.
        epoch: Its epoch, from 1.
        first: Whether the epoch begins with it.
        begin: When it began, in seconds since the epoch.
        end: When it ended.
    """

    number: int
    epoch: int
    first: bool
    begin: float
    end: float


@dataclass(frozen=True)
class WorkerTimeline:
    """The recording of one worker.

    Attributes:
        worker: Its number; 0 is the chief.
        devices: The device of each of its replicas.
        steps: Its steps.
        calls: The calls of its train function, if there were any.
        meetings: Meetings of all workers: when this one came, and when it knew
            that all had come. In seconds since the epoch, as all times.
    """

    worker: int
    devices: Sequence[str]
    steps: Sequence[StepTimes]
    calls: Sequence[Call] = ()
    meetings: Sequence[tuple[float, float]] = ()

    def dumps(self) -> str:
        """As JSON, to be sent to another worker."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "WorkerTimeline":
        """The inverse of `dumps`."""
        read = json.loads(text)
        steps = [
            StepTimes(
                **{
                    **step,
                    "packs": [
                        PackLabel(**{**pack, "layers": tuple(pack["layers"])})
                        for pack in step["packs"]
                    ],
                }
            )
            for step in read["steps"]
        ]
        calls = [Call(**call) for call in read["calls"]]
        meetings = [(entered, left) for entered, left in read["meetings"]]
        return cls(read["worker"], read["devices"], steps, calls, meetings)


@dataclass(frozen=True)
class Clock:
    """How far the clock of a worker is from the chief's.

    Attributes:
        ahead: Seconds that it is ahead of the chief's.
        error: By how much `ahead` may be wrong, in seconds.
    """

    ahead: float = 0.0
    error: float = 0.0


def clock_of(
    worker: Sequence[tuple[float, float]], chief: Sequence[tuple[float, float]]
) -> Clock:
    """Bounds the offset of two clocks by the barriers that both passed.

        chief    entered |------------------------| left
        worker          entered |-----------| left

    Nobody leaves a meeting before the other has entered it. So the worker's
    clock is ahead by at least `entered - left of the chief`, and by at most
    `left - entered of the chief`; of many meetings the narrowest limits count.
    The middle of them is off by half their distance at most (as long as the
    clocks do not drift apart within the meetings).

    Args:
        worker: When the worker entered and left each meeting, by its clock.
        chief: The same of the chief, by its own.
    """
    if not worker:
        return Clock()
    pairs = list(zip(worker, chief, strict=True))
    least = max(mine[0] - theirs[1] for mine, theirs in pairs)
    most = min(mine[1] - theirs[0] for mine, theirs in pairs)
    return Clock((least + most) / 2, abs(most - least) / 2)
