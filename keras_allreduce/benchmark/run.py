"""Measures the all-reduce: `python -m keras_allreduce.benchmark --help`.

docs/benchmark.md explains the output.
"""

import functools
import importlib
import inspect
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.benchmark.options import (
    BenchmarkOptions,
    divide,
    loops_for,
    workers_in,
)
from keras_allreduce.benchmark.table import REFERENCE, Row, Setting
from keras_allreduce.benchmark.timed_loop import (
    Gradient,
    Message,
    TimedLoop,
    WrongSumError,
    mpi_can_sum,
    plain_mpi_seconds,
)
from keras_allreduce.compat.distribute import has_nccl
from keras_allreduce.devices import host_devices, is_gpu
from keras_allreduce.environment import HOST_DEVICES
from keras_allreduce.reduce.algorithms import runnable
from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
from keras_allreduce.strategy.multi_worker import MultiWorkerAllReduceStrategy
from keras_allreduce.strategy.one_machine import AllReduceStrategy
from keras_allreduce.version import __version__
from keras_allreduce.workers.mpi import library
from keras_allreduce.workers.mpi.start import GRPC, MPI, choose_transport

Timed = Callable[[Any, tf.Tensor, int], float]
"""Sums values of round `number`, `loops` times: the seconds of one."""


def strategies_for(options: BenchmarkOptions) -> dict[str, Any]:
    """Makes a strategy for each algorithm asked for.

    Returns:
        By name of the algorithm, all on the same replicas.

    Raises:
        ValueError: If an algorithm does not run here, or there are not the
            devices asked for, or only one of them.
    """
    if workers_in() > 1:
        return _strategies_between_workers(options)
    devices = _devices(options.replicas)
    made = {}
    asked = options.algorithm
    for algorithm in runnable(devices) if asked == "all" else [asked]:
        strategy = AllReduceStrategy(
            devices, algorithm=algorithm, fit_log=False
        )
        # What "auto" stands for.
        name = BatchAllReduce(algorithm).choose(devices)[0]
        made[name] = strategy
    return made


def _strategies_between_workers(options: BenchmarkOptions) -> dict[str, Any]:
    """By transport: the one that is chosen, or all that run here.

    GPUs have one, NCCL, with either transport.
    """
    if options.algorithm not in ("auto", "all"):
        raise ValueError(
            "Between workers there is one algorithm. Received: "
            f"--algorithm {options.algorithm}. Leave it out."
        )
    if options.replicas is not None:
        _check_devices_of_launcher(options.replicas)
        host_devices(options.replicas)
    if _has_gpus() and has_nccl():
        return {"nccl": MultiWorkerAllReduceStrategy(fit_log=False)}
    chosen = choose_transport("auto", os.environ)
    compares = options.algorithm == "all" and chosen == MPI
    return {
        transport: MultiWorkerAllReduceStrategy(
            fit_log=False, transport=transport
        )
        for transport in ((GRPC, MPI) if compares else (chosen,))
    }


def messages_for(
    options: BenchmarkOptions,
) -> Iterator[list[Gradient]]:
    """Yields the gradients of each message.

    Raises:
        ValueError: If there is no such model.
    """
    if options.model is not None:
        yield gradients_of(options.model, options.dtype)
        return
    dtype = options.dtype or "float32"
    for nbytes in options.sizes:
        yield [
            Gradient((elements,), tf.as_dtype(dtype))
            for elements in divide(nbytes, dtype, options.gradients)
        ]


def gradients_of(name: str, dtype: str | None) -> list[Gradient]:
    """Shapes and dtypes of the gradients of a model.

    Args:
        name: `"module:callable"`; the callable returns a built model. Its
            argument `weights`, if it has one, is `None`.
        dtype: Name of the dtype; `None`: that of each variable.

    Raises:
        ValueError: If it does not name one.
    """
    make = _callable_named(name)
    arguments: dict[str, None] = {}
    try:
        signature = inspect.signature(make)
        if "weights" in signature.parameters:
            arguments["weights"] = None
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--model {name} must be callable without arguments: {error}"
        ) from error
    model = make(**arguments)
    if not isinstance(model, keras.Model) or not model.trainable_variables:
        raise ValueError(
            "--model must make a built keras.Model with trainable variables. "
            f"Received from {name}: {model!r}"
        )
    return [
        Gradient(tuple(variable.shape), tf.as_dtype(dtype or variable.dtype))
        for variable in model.trainable_variables
    ]


def _callable_named(name: str) -> Any:
    """Imports `"module:callable"`."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            "--model must be module:callable, such as "
            f"keras.applications:ResNet50. Received: {name!r}"
        )
    try:
        make: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no --model {name}: {error}") from error
    return make


def measure(
    strategies: dict[str, Any],
    gradients: Sequence[Gradient],
    options: BenchmarkOptions,
) -> list[Row]:
    """Measures one message with all settings, in turns.

    Args:
        strategies: What `strategies_for` gave.
        gradients: The message.
        options: Options of the command line.

    Raises:
        WrongSumError: If a sum is wrong.
    """
    any_strategy = next(iter(strategies.values()))
    message = Message(any_strategy, gradients)
    nbytes = sum(gradient.nbytes for gradient in gradients)
    loops = options.loops or loops_for(
        nbytes, len(gradients), any_strategy.extended.num_workers
    )
    timed_loops = {
        Setting(algorithm, size): TimedLoop(message, strategy, size)
        for algorithm, strategy in strategies.items()
        for size in options.bytes_per_pack
    }
    timed: dict[Setting, Timed] = {
        setting: loop.seconds for setting, loop in timed_loops.items()
    }
    if len(strategies) > 1 and MPI in strategies and mpi_can_sum(message):
        timed[Setting(REFERENCE, 0)] = functools.partial(
            plain_mpi_seconds, library.load().COMM_WORLD, message
        )
    seconds = _take_turns(message, timed, options, loops)
    return [
        _row(setting, message, timed_loops.get(setting), nbytes, loops, times)
        for setting, times in seconds.items()
    ]


def _take_turns(
    message: Message,
    timed: dict[Setting, Timed],
    options: BenchmarkOptions,
    loops: int,
) -> dict[Setting, list[float]]:
    """Seconds of every round of each setting, all settings in each round."""
    seconds: dict[Setting, list[float]] = {setting: [] for setting in timed}
    # One more: the first call traces.
    untimed = options.warmup + 1
    for count in range(untimed + options.rounds):
        number = tf.constant(count)
        values = message.make(number)
        for setting, sums in timed.items():
            try:
                spent = sums(values, number, loops)
            except WrongSumError as error:
                raise WrongSumError(f"{setting}: {error}") from None
            if count >= untimed:
                seconds[setting].append(spent)
    return seconds


def about(strategies: dict[str, Any], options: BenchmarkOptions) -> dict:
    """Machine and versions of the measurement."""
    strategy = next(iter(strategies.values()))
    return {
        "keras_allreduce": __version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        "devices": list(strategy.extended.worker_devices),
        "device_kind": _kind_of(strategy.extended.worker_devices[0]),
        "cores": _cores(),
        "workers": strategy.extended.num_workers,
        "replicas": strategy.num_replicas_in_sync,
        "model": options.model,
        "dtype": options.dtype or (None if options.model else "float32"),
        "warmup": options.warmup,
    }


def _row(
    setting: Setting,
    message: Message,
    timed: TimedLoop | None,
    nbytes: int,
    loops: int,
    times: Sequence[float],
) -> Row:
    # Nothing is recorded where TensorFlow's own all-reduce takes over.
    plan = timed.records[0].plan if timed and timed.records else None
    return Row(
        setting,
        nbytes,
        gradients=len(message.gradients),
        num_packs=plan.num_packs if plan else None,
        plan=str(plan) if plan else "",
        replicas=message.strategy.num_replicas_in_sync,
        loops=loops,
        seconds=tuple(times),
    )


def _devices(asked: int | None) -> list[str]:
    gpus = tf.config.list_logical_devices("GPU") if _has_gpus() else []
    if not gpus:
        asked = asked or int(os.environ.get(HOST_DEVICES, 2))
        return host_devices(asked)
    if asked is not None and asked > len(gpus):
        raise ValueError(
            f"There are {len(gpus)} GPUs. Received: --replicas {asked}. Set "
            "CUDA_VISIBLE_DEVICES=-1 to use logical CPU devices."
        )
    return [f"/gpu:{index}" for index in range(asked or len(gpus))]


def _has_gpus() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _check_devices_of_launcher(replicas: int) -> None:
    told = os.environ.get(HOST_DEVICES)
    if told is not None and told != str(replicas):
        raise ValueError(
            "Pass --replicas or the --devices-per-worker of the launcher. "
            f"Received: --replicas {replicas}, {HOST_DEVICES}={told}"
        )


def _cores() -> int:
    # Those that this process may use, where the system tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kind_of(device: str) -> str:
    if not is_gpu(device):
        return "logical CPU device"
    gpu = tf.config.list_physical_devices("GPU")[0]
    details = tf.config.experimental.get_device_details(gpu)
    return str(details.get("device_name", "GPU"))
