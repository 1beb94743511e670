"""Data-parallel Keras training that shows the cost of its all-reduce."""

import importlib
from typing import TYPE_CHECKING, Any

from keras_allreduce.compat import versions as _versions
from keras_allreduce.version import __version__ as __version__

if TYPE_CHECKING:
    from keras_allreduce.devices import host_devices
    from keras_allreduce.fit_output.callbacks import (
        AllReduceLogger,
        AllReduceTensorBoard,
    )
    from keras_allreduce.fit_output.stats import ReduceStats
    from keras_allreduce.fit_output.timeline import AllReduceTimeline
    from keras_allreduce.reduce.batch_all_reduce import BatchAllReduce
    from keras_allreduce.reduce.cost_model import Link
    from keras_allreduce.strategy.multi_worker import (
        MultiWorkerAllReduceStrategy,
    )
    from keras_allreduce.strategy.one_machine import AllReduceStrategy
    from keras_allreduce.workers.errors import (
        WorkerError,
        WorkerLostError,
        WorkersDifferError,
        WorkerStartError,
        WorkerTimeoutError,
    )
    from keras_allreduce.workers.resolvers import LauncherClusterResolver
    from keras_allreduce.workers.wire_formats import WireFormat

__all__ = [
    "AllReduceLogger",
    "AllReduceStrategy",
    "AllReduceTensorBoard",
    "AllReduceTimeline",
    "BatchAllReduce",
    "LauncherClusterResolver",
    "Link",
    "MultiWorkerAllReduceStrategy",
    "ReduceStats",
    "WireFormat",
    "WorkerError",
    "WorkerLostError",
    "WorkerStartError",
    "WorkerTimeoutError",
    "WorkersDifferError",
    "host_devices",
]

# Public names are imported on first use (PEP 562), so that the launcher, a
# module of this package, does not load TensorFlow.
_HOMES = {
    "AllReduceLogger": "fit_output.callbacks",
    "AllReduceStrategy": "strategy.one_machine",
    "AllReduceTensorBoard": "fit_output.callbacks",
    "AllReduceTimeline": "fit_output.timeline",
    "BatchAllReduce": "reduce.batch_all_reduce",
    "LauncherClusterResolver": "workers.resolvers",
    "Link": "reduce.cost_model",
    "MultiWorkerAllReduceStrategy": "strategy.multi_worker",
    "ReduceStats": "fit_output.stats",
    "WireFormat": "workers.wire_formats",
    "WorkerError": "workers.errors",
    "WorkerLostError": "workers.errors",
    "WorkerStartError": "workers.errors",
    "WorkerTimeoutError": "workers.errors",
    "WorkersDifferError": "workers.errors",
    "host_devices": "devices",
}


if not TYPE_CHECKING:  # Which takes it as: there is every name.

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}"
            )
        try:
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        except ImportError as error:
            _versions.explain_import_error(error)
            raise
        value = getattr(home, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
