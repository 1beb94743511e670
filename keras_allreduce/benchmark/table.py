"""Output of the benchmark: table, JSON, and the fastest settings."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from keras_allreduce.reduce.plan import bus_share

CLASSES = (
    ("up to 64 KiB", 0, 2**16),
    ("above 64 KiB, up to 4 MiB", 2**16 + 1, 2**22),
    ("above 4 MiB", 2**22 + 1, math.inf),
)
"""Size classes: what they are called, least and most bytes."""

REFERENCE = "MPI_Allreduce"
"""The rival that no strategy can select: in the table, but never fastest."""

# Name of a column, its width, its format.
_COLUMNS = (
    ("bytes", 11, "d"),
    ("gradients", 10, "d"),
    ("algorithm", 15, "s"),
    ("pack_bytes", 11, "s"),
    ("packs", 6, "s"),
    ("loops", 6, "d"),
    ("median_us", 11, ".1f"),
    ("p90_us", 11, ".1f"),
    ("algbw", 8, ".3f"),
    ("busbw", 8, ".3f"),
)


@dataclass(frozen=True)
class Setting:
    """A setting of the benchmark.

    Attributes:
        algorithm: Who sums.
        bytes_per_pack: Capacity of a pack in bytes; 0: the default one.
    """

    algorithm: str
    bytes_per_pack: int

    @property
    def pack_bytes(self) -> str:
        """The capacity as the table shows it."""
        return str(self.bytes_per_pack or "default")

    def __str__(self) -> str:
        size = self.bytes_per_pack
        return (
            f"{self.algorithm}, packs of "
            f"{f'{size} bytes' if size else 'default size'}"
        )


@dataclass(frozen=True)
class Row:
    """The cost of one message with one setting.

    Attributes:
        setting: Who sums, in which packs.
        nbytes: Bytes of the message on one replica.
        gradients: Number of gradients that make it up.
        num_packs: Packs in which it travels, `None` if TensorFlow's own
            all-reduce takes it.
        plan: The plan line of the all-reduce, or `""`.
        replicas: Number of replicas, over all workers.
        loops: All-reduces in each timed call.
        seconds: Time of one all-reduce in each timed call.
    """

    setting: Setting
    nbytes: int
    gradients: int
    num_packs: int | None
    plan: str
    replicas: int
    loops: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median time of one all-reduce in seconds."""
        return statistics.median(self.seconds)

    @property
    def algbw(self) -> float:
        """Algorithm bandwidth in 10^9 bytes per second: size / median."""
        return self.nbytes / self.median / 1e9

    @property
    def busbw(self) -> float:
        """Bus bandwidth as nccl-tests define it, in 10^9 bytes per second."""
        return self.algbw * bus_share(self.replicas)


def p90(seconds: Sequence[float]) -> float:
    """The least value that 90% of the values are not above."""
    return sorted(seconds)[math.ceil(0.9 * len(seconds)) - 1]


def head() -> str:
    """The line above the rows."""
    words = "".join(f"{name:>{width}}" for name, width, _ in _COLUMNS)
    return f"#{words[1:]}"


def line(row: Row) -> str:
    """A row of the table."""
    values = _values(row)
    packs = row.num_packs
    values |= {
        "pack_bytes": row.setting.pack_bytes,
        "packs": "-" if packs is None else str(packs),
        "algbw": values["algbw_gbps"],
        "busbw": values["busbw_gbps"],
    }
    return "".join(
        f"{values[name]:>{width}{form}}" for name, width, form in _COLUMNS
    )


def fastest(rows: Sequence[Row]) -> dict[str, dict[Setting, float]]:
    """Settings from the fastest on, over all sizes and in each size class.

    Only settings that a strategy can be told to use.

    Their times are geometric means of medians: a size that is 2x slower
    weighs as much as one that is 2x faster.

    Returns:
        By "overall" and the classes that have a row: settings in ascending
        order of their times, with these, in seconds.
    """
    rows = [row for row in rows if row.setting.algorithm != REFERENCE]
    groups = {"overall": list(rows)}
    for name, least, most in CLASSES:
        groups[name] = [row for row in rows if least <= row.nbytes <= most]
    return {name: _times(group) for name, group in groups.items() if group}


def verdict(rows: Sequence[Row]) -> list[str]:
    """Lines that name the fastest setting, and by how much."""
    lines = []
    for name, times in fastest(rows).items():
        first, *others = times
        said = f"# fastest {name}: {first}"
        if others:
            ratio = times[others[0]] / times[first]
            said += f" ({ratio:.2f}x as fast as {others[0]})"
        lines.append(said)
    if len({row.setting for row in rows}) == 1:
        lines.append(
            "# One setting was measured: --algorithm all and --bytes-per-pack "
            "compare several."
        )
    return lines


def document(about: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """All of it, for `json.dumps`."""
    return {
        **about,
        "rows": [_values(row) for row in rows],
        "fastest": [
            {"sizes": name, **asdict(next(iter(times)))}
            for name, times in fastest(rows).items()
        ],
    }


def _values(row: Row) -> dict[str, Any]:
    return {
        "bytes": row.nbytes,
        "gradients": row.gradients,
        "algorithm": row.setting.algorithm,
        "bytes_per_pack": row.setting.bytes_per_pack,
        "num_packs": row.num_packs,
        "plan": row.plan,
        "loops": row.loops,
        "rounds": len(row.seconds),
        "median_us": row.median * 1e6,
        "p90_us": p90(row.seconds) * 1e6,
        "algbw_gbps": row.algbw,
        "busbw_gbps": row.busbw,
    }


def _times(rows: Sequence[Row]) -> dict[Setting, float]:
    medians: dict[Setting, list[float]] = {}
    for row in rows:
        medians.setdefault(row.setting, []).append(row.median)
    means = {
        setting: statistics.geometric_mean(times)
        for setting, times in medians.items()
    }
    return dict(sorted(means.items(), key=lambda item: item[1]))
