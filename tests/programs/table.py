"""The table of programs: each trains on N replicas or workers as on one.

Not a test. A program is a function that knows nothing of replicas, trains, and
returns a dict of all that has to be as on one device. It stands once, under the
subject that it is about, and says where it runs:

    replicas            in one process, `test_programs.py`
    on="threads"        workers as threads of one process, `test_threads.py`
    on="workers"        workers over gRPC, `test_multi_worker.py`
    on="devices"        the same, with two devices each
    on="mpi"            workers over MPI, `test_mpi.py`
    feature="..."       a row of the table that `benchmarks/features.py` makes

On GPUs run those that run on workers. All compare with one reference, made once
in a run of the tests.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Products on GPUs in float32, not in the 11 bits of TF32.
tf.config.experimental.enable_tensor_float_32_execution(False)

# From here on Keras weighs the losses of single outputs by what it has traced,
# `test_keras_weighs_the_losses_of_outputs_alike_in_all_batches`.
KERAS_WEIGHS_OUTPUTS_BY_TRACE = (3, 16)

PLACES = {"threads", "workers", "devices", "mpi"}


@dataclass(frozen=True)
class Program:
    """A row of the table.

    Attributes:
        name: Name of the function.
        train: Trains in the scope of a strategy, and returns what it came to;
            if that is a function, it is called outside the scope.
        replicas: Numbers of replicas in one process.
        on: Where it runs on workers, of `PLACES`.
        tolerance: How far weights may differ; logs may ten times as far.
        feature: Its row in the table of features, if it has one.
        fast: Whether `make test-fast` runs it on three replicas.
        nightly: Where it runs at night only, of `replicas` and what `on` says:
            what it is about is seen elsewhere at each push.
        is_like_one: Whether all that it returns is as on one device; else a
            test of its own says what is.
        may_be_nan: Whether its loss is NaN on a batch without what it counts.
        logs_of_worker: Whether its logs on a worker are those of the worker's
            samples: what its own step returns, or `train_on_batch`.
        options: Of the strategy.
    """

    name: str
    train: Callable[[], Any]
    replicas: tuple[int, ...] = (3,)
    on: frozenset[str] = frozenset()
    tolerance: float = 1e-6
    feature: str = ""
    fast: bool = False
    nightly: frozenset[str] = frozenset()
    is_like_one: bool = True
    may_be_nan: bool = False
    logs_of_worker: bool = False
    options: tuple[tuple[str, Any], ...] = ()


PROGRAMS: dict[str, Program] = {}

COMPARING: dict[str, Callable[[], Any]] = {}
"""Programs whose loss compares samples of a batch with each other."""


def program(train=None, *, on="", nightly="", options=(), **settings):
    """Adds a program to the table."""

    def add(train):
        name = train.__name__
        places, at_night = frozenset(on.split()), frozenset(nightly.split())
        assert name not in PROGRAMS, name
        assert places <= PLACES, on
        assert at_night <= {*places, "replicas"}, nightly
        PROGRAMS[name] = Program(
            name,
            train,
            on=places,
            nightly=at_night,
            options=tuple(options),
            **settings,
        )
        return train

    return add if train is None else add(train)


def comparing(train):
    COMPARING[train.__name__] = train
    return train


def programs_on(place):
    """Names of the programs that run on workers at a place."""
    return [
        name
        for name, each in PROGRAMS.items()
        if place in each.on and each.is_like_one
    ]


def run(name, strategy=None):
    """What a program comes to, ready for JSON, and the user's warnings."""
    train = COMPARING.get(name) or PROGRAMS[name].train
    keras.utils.clear_session(free_memory=False)  # The same names again.
    keras.utils.set_random_seed(3)
    scope = contextlib.nullcontext() if strategy is None else strategy.scope()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with scope:
            found = train()
        if callable(found):
            found = found()
    warned = [str(w.message) for w in caught if w.category is UserWarning]
    return keras.tree.map_structure(_plain, found), warned


def _plain(value):
    return np.asarray(value).tolist()


# One reference ----------------------------------------------------------------

# Folder of this run of the tests; conftest.py sets it.
SHARED = Path()


def on_one_device(name):
    """What a program comes to without a strategy, and its warnings.

    The processes that compare with it share it: the first one that needs it
    leaves it for the others.
    """
    path = SHARED / f"{name}.json"
    if not path.exists():
        text = json.dumps(run(name))
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(text)
        own.rename(path)
    return json.loads(path.read_text())


def agree_on_workers(name, results):
    """Asserts that all workers have come to the same bits, and as one device.

    Args:
        name: Name of the program.
        results: What it came to on each worker.
    """
    wanted, _ = on_one_device(name)
    if PROGRAMS[name].logs_of_worker:
        results = [{"weights": each["weights"]} for each in results]
        wanted = {"weights": wanted["weights"]}
    first, *others = results
    for other in others:
        for path, got, want in _pairs(other, first):
            np.testing.assert_array_equal(got, want, f"{name} {path}")
    agree(name, first, wanted)


def agree(name, found, wanted, least=0):
    """Asserts that a program has come to the same, up to rounding.

    Args:
        name: Name of the program.
        found: What it came to.
        wanted: What it has to come to.
        least: Tolerance, if that of the program is smaller.
    """
    tolerance = max(PROGRAMS[name].tolerance, least)
    for path, got, want in _pairs(found, wanted):
        if weighs_outputs_by_trace() and _is_loss_of_an_output(path):
            continue
        assert np.isfinite(want) or PROGRAMS[name].may_be_nan, (path, want)
        bound = tolerance if "weights" in path else 10 * tolerance
        np.testing.assert_allclose(
            got, want, rtol=bound, atol=bound, err_msg=f"{name} {path}"
        )


def weighs_outputs_by_trace():
    """Whether this Keras shows losses that depend on the traces of a step."""
    release = tuple(map(int, keras.__version__.split(".")[:2]))
    return release >= KERAS_WEIGHS_OUTPUTS_BY_TRACE


def _is_loss_of_an_output(path):
    of, *names = map(str, path)
    return of == "history" and any(
        name.endswith("_loss") and name != "val_loss" for name in names
    )


def _pairs(found, wanted):
    """Each path in what a program came to, with both numbers there."""
    keras.tree.assert_same_structure(found, wanted)
    for (path, got), (_, want) in zip(
        keras.tree.flatten_with_path(found),
        keras.tree.flatten_with_path(wanted),
        strict=True,
    ):
        yield path, got, want
