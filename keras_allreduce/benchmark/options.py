"""Reads the command line of the benchmark: sizes and settings."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keras_allreduce.environment import TF_CONFIG
from keras_allreduce.reduce.pack_sizes import algorithm_names
from keras_allreduce.workers.cluster import num_workers, read_tf_config
from keras_allreduce.workers.ranks import placement_of

ALGORITHMS = (*algorithm_names(), "all")
DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")

_ITEM_BYTES = {"16": 2, "32": 4, "64": 8}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

# Bytes per timed call, so that one call takes long against a clock's tick and
# short against a user's patience. It depends on no clock: between workers all
# must loop as often.
_BYTES_PER_CALL = 128 * 2**20
_MAX_LOOPS = 100
# The call itself costs about 0.1 ms for each of its gradients.
_LOOPS_IF_MANY = 10
# A round trip between workers takes milliseconds; a call is cheap beside it.
_MAX_LOOPS_BETWEEN_WORKERS = 10

_DESCRIPTION = """
Measures the all-reduce of gradients on this machine, or between workers if
TF_CONFIG or mpirun tells of them, as a tf.function does. Sums are checked.
"""

_EPILOG = """
Bytes may end in K, M or G (2^10, 2^20, 2^30). Between workers of this machine:
python -m keras_allreduce.launch --workers 2 -m keras_allreduce.benchmark, or
mpirun -n 2 python -m keras_allreduce.benchmark --algorithm all.
Exit code: 1 if a sum is wrong, 2 if the command line makes no sense.
docs/benchmark.md explains the output.
"""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command line.

    Attributes:
        sizes: Bytes of the messages, in ascending order.
        gradients: Into how many gradients each is divided.
        model: `"module:callable"` whose gradients are measured instead, or
            `None`.
        algorithm: One of `ALGORITHMS`.
        bytes_per_pack: Capacities of a pack to compare; 0: the default.
        replicas: Devices of this process; `None`: as many as there are.
        dtype: Name of the dtype; `None`: float32, or the model's own.
        rounds: Timed calls per message and setting.
        warmup: Calls before them.
        loops: All-reduces in a call; `None`: by the size.
        as_json: Whether to print one JSON document instead of a table.
    """

    sizes: tuple[int, ...]
    gradients: int
    model: str | None
    algorithm: str
    bytes_per_pack: tuple[int, ...]
    replicas: int | None
    dtype: str | None
    rounds: int
    warmup: int
    loops: int | None
    as_json: bool


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m keras_allreduce.benchmark",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _add_what_is_measured(made)
    _add_how_it_is_measured(made)
    return made


def _add_what_is_measured(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--min-bytes", type=_positive_bytes, metavar="S", help="default: 4K")
    add("--max-bytes", type=_positive_bytes, metavar="S", help="default: 256M")
    add("--factor", type=int, help="from size to size; default: 4")
    add(
        "--gradients",
        type=int,
        metavar="G",
        help="equal gradients that make up each size; default: 1",
    )
    add(
        "--model",
        metavar="MODULE:CALLABLE",
        help="measure the gradients of this Keras model instead of sizes, such "
        "as keras.applications:ResNet50",
    )
    add(
        "--algorithm",
        choices=ALGORITHMS,
        default="auto",
        help="default: auto; all: each that runs here (by mpirun: gRPC, MPI, "
        "and a plain MPI_Allreduce)",
    )
    add(
        "--bytes-per-pack",
        type=_pack_list,
        metavar="S,S",
        help="capacities of a pack to compare, 0: the default one",
    )
    add(
        "--replicas",
        type=int,
        metavar="N",
        help="devices of this process; default: all GPUs, or without one 2 "
        "logical CPU devices (between workers: 1)",
    )
    add("--dtype", choices=DTYPES, help="default: float32, or the model's own")


def _add_how_it_is_measured(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--rounds", type=int, default=20, help="timed calls; default: 20")
    add("--warmup", type=int, default=2, help="calls before; default: 2")
    add(
        "--loops",
        type=int,
        help="all-reduces in a call; default: by size, up to 100 (between "
        "workers: 10)",
    )
    add("--json", action="store_true", help="print one JSON document")


def options_of(given: argparse.Namespace) -> BenchmarkOptions:
    """Checks the parsed options.

    Raises:
        ValueError: If it makes no sense together.
    """
    _check_counts(given)
    _check_sizes_or_model(given)
    gradients = given.gradients or 1
    sizes: tuple[int, ...] = ()
    if given.model is None:
        sizes = sizes_between(
            given.min_bytes or 2**12,
            given.max_bytes or max(given.min_bytes or 0, 2**28),
            given.factor or 4,
        )
        least_bytes = gradients * item_bytes(given.dtype or "float32")
        if sizes[0] < least_bytes:
            raise ValueError(
                "The smallest size must have an element for each gradient. "
                f"Received: --min-bytes {sizes[0]}, needed: {least_bytes}"
            )
    return BenchmarkOptions(
        sizes=sizes,
        gradients=gradients,
        model=given.model,
        algorithm=given.algorithm,
        bytes_per_pack=given.bytes_per_pack or (0,),
        replicas=given.replicas,
        dtype=given.dtype,
        rounds=given.rounds,
        warmup=given.warmup,
        loops=given.loops,
        as_json=given.json,
    )


def _check_counts(given: argparse.Namespace) -> None:
    counts = ("gradients", "replicas", "rounds", "loops")
    least = {**dict.fromkeys(counts, 1), "warmup": 0, "factor": 2}
    for name, minimum in least.items():
        value = getattr(given, name)
        if value is not None and value < minimum:
            raise ValueError(
                f"--{name} must be at least {minimum}. Received: {value}"
            )


def _check_sizes_or_model(given: argparse.Namespace) -> None:
    if given.model is not None:
        for name in ("min_bytes", "max_bytes", "factor", "gradients"):
            if getattr(given, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for sizes, and --model "
                    "measures the gradients of a model. Pass one of them."
                )
    elif given.bytes_per_pack and (given.gradients or 1) == 1:
        raise ValueError(
            "A pack size makes no difference to one gradient, which travels "
            "alone. Pass --gradients 16, or --model, with --bytes-per-pack."
        )


def workers_in(environment: Mapping[str, str] = os.environ) -> int:
    """Number of workers that TF_CONFIG names, or that mpirun has started.

    Raises:
        ValueError: If TF_CONFIG does not describe workers.
    """
    text = environment.get(TF_CONFIG, "")
    placement = None if text.strip() else placement_of(environment)
    if placement is not None:
        return placement.size
    described = read_tf_config(text)
    return 1 if described is None else max(num_workers(described[0]), 1)


def sizes_between(least: int, most: int, factor: int) -> tuple[int, ...]:
    """Returns `least`, `least * factor`, ... up to `most`.

    Raises:
        ValueError: If `most` is below `least`.
    """
    if most < least:
        raise ValueError(
            "--max-bytes must not be below --min-bytes. Received: "
            f"--min-bytes {least} --max-bytes {most}"
        )
    sizes = [least]
    while sizes[-1] * factor <= most:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def divide(nbytes: int, dtype: str, gradients: int) -> list[int]:
    """Elements of each gradient of a message; they differ by at most one.

    Args:
        nbytes: Size of the message; rounded down to whole elements.
        dtype: Name of the dtype.
        gradients: Number of gradients.
    """
    elements = nbytes // item_bytes(dtype)
    share, left = divmod(elements, gradients)
    return [share + (index < left) for index in range(gradients)]


def loops_for(nbytes: int, gradients: int, num_workers: int) -> int:
    """All-reduces in one timed call: many if they are small, or of many parts.

    Args:
        nbytes: Size of the message.
        gradients: Number of gradients that make it up.
        num_workers: Number of workers.
    """
    by_size = max(1, _BYTES_PER_CALL // nbytes)
    if num_workers > 1:
        return min(_MAX_LOOPS_BETWEEN_WORKERS, by_size)
    return min(_MAX_LOOPS, max(by_size, min(gradients, _LOOPS_IF_MANY)))


def item_bytes(dtype: str) -> int:
    """Bytes of one element: 4 for `"float32"`."""
    return _ITEM_BYTES[dtype[-2:]]


def bytes_of(text: str) -> int:
    """Reads `"4096"`, `"4K"` or `"4KiB"`.

    Raises:
        ValueError: If it is none of these.
    """
    found = re.fullmatch(r"([0-9]+)([KMG]?)(iB)?", text.strip())
    if not found or (found[3] and not found[2]):
        raise ValueError(
            "A size is a number of bytes that may end in K, M or G, such as "
            f"64K. Received: {text!r}"
        )
    return int(found[1]) * _UNITS[found[2]]


def _positive_bytes(text: str) -> int:
    try:
        nbytes = bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if nbytes < 1:
        raise argparse.ArgumentTypeError(
            f"A size must be positive. Received: {text!r}"
        )
    return nbytes


def _pack_list(text: str) -> tuple[int, ...]:
    try:
        sizes: Sequence[int] = [bytes_of(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(dict.fromkeys(sizes))
