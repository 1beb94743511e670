"""From measured costs to fits, predictions and the tables that show them."""

import functools
import statistics
from dataclasses import dataclass

import scaling_model
from scaling_model import Inside, Link, Point

from keras_allreduce.reduce import pack_sizes

PROCESS, LOOPBACK, WIRE = "1 process", "loopback", "1gbit"
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8, "100 Gbit/s": 1e11 / 8}
WORKERS = (8, 16, 64)
MIB = 2**20


@dataclass(frozen=True, order=True)
class Setting:
    """`workers` processes with `devices` logical CPU devices each."""

    place: str
    workers: int
    devices: int

    @property
    def replicas(self) -> int:
        """Number of replicas over all workers."""
        return self.workers * self.devices


@dataclass(frozen=True)
class Measurement:
    """Median time of one all-reduce in one pass. Travels as JSON."""

    setting: Setting
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Models:
    """What was fitted on two workers and two devices, for these cores."""

    links: dict[str, Link]
    inside: Inside
    cores: int

    def seconds(self, setting: Setting, nbytes: int, shared: bool) -> float:
        """Predicts a measurement.

        Args:
            setting: Who takes part.
            nbytes: Size of the message.
            shared: Whether more processes than cores slow each other.
        """
        if setting.place == PROCESS:
            return scaling_model.inside_seconds(
                nbytes, setting.devices, self.inside
            )
        link = self.links[setting.place]
        if shared:
            factor = scaling_model.crowding(setting.workers, self.cores)
            link = scaling_model.crowded(
                link, factor, by_cores=setting.place == LOOPBACK
            )
        return scaling_model.hierarchical_seconds(
            nbytes, setting.workers, setting.devices, link, self.inside
        )


# Fitting and predicting -----------------------------------------------------


def medians(found: list[Measurement]) -> dict[tuple[Setting, int], float]:
    """Median over the passes by setting and size."""
    by_key: dict[tuple[Setting, int], list[float]] = {}
    for one in found:
        by_key.setdefault((one.setting, one.nbytes), []).append(one.seconds)
    return {key: statistics.median(by_key[key]) for key in sorted(by_key)}


def spread(found: list[Measurement]) -> float:
    """Median over settings and sizes of slowest pass / fastest pass."""
    by_key: dict[tuple[Setting, int], list[float]] = {}
    for one in found:
        by_key.setdefault((one.setting, one.nbytes), []).append(one.seconds)
    return statistics.median(
        max(times) / min(times) for times in by_key.values()
    )


def fit(times: dict[tuple[Setting, int], float], cores: int) -> Models:
    def points(place: str) -> list[Point]:
        return [
            Point(nbytes, 2, seconds)
            for (setting, nbytes), seconds in times.items()
            if setting.place == place and setting.replicas == 2
        ]

    inside = scaling_model.fit_inside(points(PROCESS))
    places = {setting.place for setting, _ in times} - {PROCESS}
    links = {
        place: scaling_model.fit_link(points(place), inside.gamma)
        for place in sorted(places)
    }
    return Models(links, inside, cores)


def off(predicted: float, measured: float) -> float:
    """How far off in percent; -50: half of what was measured."""
    return (predicted / measured - 1) * 100


def exposed(
    replicas: int,
    link: Link,
    inside: Inside,
    devices: int,
    args,
    best: bool = False,
) -> tuple[float, int]:
    """Seconds that a step waits, and the capacity of a pack in bytes.

    `devices` of each machine are summed first. The capacity is the best, or
    else that of --pack-bytes or the package's own.
    """
    machines = replicas // devices

    def cost(nbytes: float, link: Link = link) -> float:
        return scaling_model.hierarchical_seconds(
            nbytes, machines, devices, link, inside
        )

    busy = functools.partial(cost, link=link.busy())
    compute = args.compute_ms / 1e3
    if best:
        pack = scaling_model.best_pack(args.gradient_bytes, compute, cost, busy)
    else:
        default = pack_sizes.between_workers(machines, args.gradient_bytes)
        pack = args.pack_bytes or default.bytes_per_pack
    seconds = scaling_model.exposed_seconds(
        args.gradient_bytes, compute, pack, cost, busy
    )
    return seconds, pack


def latencies(models: Models, args) -> dict[str, float]:
    """Seconds of a step, by where they are from."""
    assumed = args.latency_us / 1e6
    title = "latency {:.0f} us a step as {}".format
    found = {title(args.latency_us, "assumed"): assumed}
    place = WIRE if WIRE in models.links else LOOPBACK
    if place in models.links:
        alpha = models.links[place].alpha
        measured = title(alpha * 1e6, f"measured ({place})")
        found = {measured: alpha, **found}
    return found


# Printing -------------------------------------------------------------------


def fit_table(models: Models) -> list[str]:
    inside = models.inside
    lines = [
        "| fitted on 2 | alpha | bandwidth | gamma |",
        "|---|---|---|---|",
        f"| {PROCESS} | {inside.fixed * 1e6:.0f} us, once | "
        f"| {inside.gamma * 1e9:.2f} ns/B |",
    ]
    for place, link in models.links.items():
        lines.append(
            f"| {place} | {link.alpha * 1e6:.0f} us a step "
            f"| {link.bandwidth / 1e6:.0f} MB/s | as above |"
        )
    return lines


def compared_table(times, models: Models) -> list[str]:
    lines = [
        "| place | workers x devices | size | measured ms | model ms | off "
        "| with shared cores ms | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (setting, nbytes), measured in times.items():
        plain, shared = (
            models.seconds(setting, nbytes, shared) for shared in (False, True)
        )
        fitted = ", fitted" if setting.replicas == 2 else ""
        lines.append(
            f"| {setting.place} | {setting.workers} x {setting.devices}{fitted}"
            f" | {size(nbytes)} | {measured * 1e3:.2f} | {plain * 1e3:.2f} "
            f"| {off(plain, measured):+.0f} % | {shared * 1e3:.2f} "
            f"| {off(shared, measured):+.0f} % |"
        )
    return lines


def summary_table(times, models: Models) -> list[str]:
    """Median of how far off, without sign, for each setting."""
    lines = [
        "| place | workers x devices | model off by | with shared cores |",
        "|---|---|---|---|",
    ]
    for setting in sorted({setting for setting, _ in times}):
        both = [
            statistics.median(
                abs(off(models.seconds(one, nbytes, shared), measured))
                for (one, nbytes), measured in times.items()
                if one == setting
            )
            for shared in (False, True)
        ]
        fitted = ", fitted" if setting.replicas == 2 else ""
        lines.append(
            f"| {setting.place} | {setting.workers} x {setting.devices}{fitted}"
            f" | {both[0]:.0f} % | {both[1]:.0f} % |"
        )
    return lines


def predicted_table(alpha: float, inside: Inside, args) -> list[str]:
    lines = [
        "| link | workers | ring: exposed ms | efficiency "
        f"| {args.devices} a machine: exposed ms | efficiency "
        "| best pack | exposed ms | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rate in RATES.items():
        link = Link(alpha, rate, inside.gamma)
        for workers in WORKERS:
            ring = exposed(workers, link, inside, 1, args)
            grouped = (workers, link, inside, args.devices, args)
            hierarchical, best = exposed(*grouped), exposed(*grouped, best=True)
            cells = [name, str(workers), *shown(ring, args)]
            cells += [*shown(hierarchical, args), size(best[1])]
            cells += shown(best, args)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(result: tuple[float, int], args) -> list[str]:
    share = scaling_model.efficiency(args.compute_ms / 1e3, result[0])
    return [f"{result[0] * 1e3:.0f}", f"{share:.3f}"]


def size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // 1024} KiB"
