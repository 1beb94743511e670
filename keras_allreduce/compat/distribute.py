"""The only importer of private TensorFlow and Keras names, and why of each.

Everything else in the package uses public API. A name moves out of this file
as soon as there is a public way.
"""

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import tensorflow as tf

# Which devices a value is on, by TensorFlow's own rule.
from tensorflow.python.distribute import cross_device_ops as _cross_device_ops

# The half of MultiWorkerMirroredStrategy that decides how values are reduced.
from tensorflow.python.distribute.collective_all_reduce_strategy import (
    CollectiveAllReduceExtended as CollectiveAllReduceExtended,
)

# The messages in which the coordination service is configured. Their own
# module has moved between versions of TensorFlow.
from tensorflow.python.distribute.collective_all_reduce_strategy import (
    coordination_config_pb2 as _coordination_config,
)

# What a strategy hands out for a dataset. Only a subclass can tell Keras the
# shapes of a batch without taking one; see `SpecFirstDataset`.
from tensorflow.python.distribute.input_lib import (
    DistributedDataset as _DistributedDataset,
)

# The half of MirroredStrategy that decides how values are reduced. A strategy
# that subclasses the public half alone cannot change it.
from tensorflow.python.distribute.mirrored_strategy import (
    MirroredExtended as MirroredExtended,
)

# `CrossDeviceOps` is public, but the two classes its values come in and its
# results go out in are not.
from tensorflow.python.distribute.values import Mirrored as _Mirrored
from tensorflow.python.distribute.values import PerReplica as PerReplica

# TensorFlow's runtime, which has the store and the servers of the workers. A
# strategy uses both and shows neither.
from tensorflow.python.eager import context as _context

# Which kernels this build of TensorFlow has: a build without NCCL has no
# kernel for NcclAllReduce, and says so only when the op runs.
from tensorflow.python.framework import kernels as _kernels

# Inside `strategy.scope()` the public `tf.Variable` makes one variable per
# replica; this is a variable on one device wherever it is made.
from tensorflow.python.ops.resource_variable_ops import (
    ResourceVariable as ResourceVariable,
)


def mirrored(values: Sequence[Any]) -> Any:
    """Wraps one value per replica, all equal, as cross-device ops return."""
    return _Mirrored(tuple(values))


def devices_of(value: Any) -> tuple[str, ...]:
    """Full device names of a distributed value, a tensor or a device name."""
    return tuple(_cross_device_ops.get_devices_from(value))


def has_nccl() -> bool:
    """Whether this build of TensorFlow can run NCCL at all."""
    return bool(_kernels.get_registered_kernels_for_op("NcclAllReduce").kernel)


def layers(model: Any) -> list[Any]:
    """All layers of a model, at any depth, and the model itself.

    The public `layers` lists only those at the top.
    """
    return list(model._flatten_layers())


def seed_generators(model: Any) -> list[Any]:
    """All `keras.random.SeedGenerator` objects in the layers of a model.

    Keras tracks them for each layer but lists only their variables.
    """
    found: dict[int, Any] = {}
    for layer in layers(model):
        for generator in getattr(layer, "_seed_generators", ()):
            found[id(generator)] = generator
    return list(found.values())


def gradient_accumulators(
    optimizer: Any, variables: Sequence[Any]
) -> list[Any] | None:
    """The variables in which `optimizer` adds up gradients of `variables`.

    Keras has no public name for them. `None` if it does not accumulate, or
    has not made them yet.
    """
    if not getattr(optimizer, "gradient_accumulation_steps", None):
        return None
    if not optimizer.built:
        return None
    accumulators = [
        optimizer._accumulated_gradients[optimizer._get_variable_index(v)]
        for v in variables
    ]
    return None if any(a is None for a in accumulators) else accumulators


def iterations(optimizer: Any) -> Any:
    """Variable that counts the gradients `optimizer` was given.

    The public `iterations` counts updates, which are fewer if it accumulates.
    """
    return optimizer._iterations.value


def loss_metrics(model: Any) -> list[Any]:
    """Metrics of the losses of a model's outputs, if it has several.

    In `model.metrics` nothing tells them from other metrics.
    """
    compiled = getattr(model, "_compile_loss", None)
    return list(compiled.metrics) if compiled is not None else []


def yields_arrays_of_python(dataset: Any) -> bool:
    """Whether the elements of a `tf.data.Dataset` come from Python code.

    There is no public way to look at what a dataset was made of.
    """
    for wrapper in dataset._functions():
        for op in wrapper.function.graph.get_operations():
            if op.type in _OPS_THAT_RUN_PYTHON:
                return True
    return any(yields_arrays_of_python(source) for source in dataset._inputs())


_OPS_THAT_RUN_PYTHON = frozenset(
    {"GeneratorDataset", "PyFunc", "PyFuncStateless", "EagerPyFunc"}
)


class SpecFirstDataset(_DistributedDataset):
    """A distributed dataset that shows Keras its shapes without being read.

    Before the first step of `fit` and `evaluate` Keras takes a batch to learn
    the shapes, and throws it away with all that was read ahead. From a Python
    generator nothing of that comes again.
    """

    def __iter__(self) -> Any:
        """Iterates; for Keras's look at the shapes over an example."""
        if _called_from("_maybe_symbolic_build"):
            example = _example(self.element_spec)
            if example is not None:
                return iter([example])
        return super().__iter__()

    @classmethod
    def take_over(cls, dataset: Any) -> Any:
        """Makes `dataset` one of these, if it is of the class they extend."""
        if type(dataset) is _DistributedDataset:
            dataset.__class__ = cls
        return dataset


def steps_of_keras_epochs() -> tuple[int | None, int | None] | None:
    """Steps and batches of the data set that Keras wants to have distributed.

    Keras's iterator knows them, and gives the strategy the data set alone. To
    be called where a strategy distributes a data set.

    Returns:
        The steps of an epoch that were asked for and the batches of the data
        set, each `None` if not known; `None` if it is not Keras that asks.
    """
    for frame in _calling_frames():
        iterator: Any = frame.f_locals.get("self")
        if hasattr(iterator, "enumerate_epoch"):
            return iterator.steps_per_epoch, iterator.data_adapter.num_batches
    return None


def _called_from(name: str) -> bool:
    return any(frame.f_code.co_name == name for frame in _calling_frames())


def _calling_frames() -> Iterator[FrameType]:
    """The frames from which a function of this module was called."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(10):
        if frame is not None:
            yield frame
            frame = frame.f_back


def _example(element_spec: Any) -> Any:
    """A batch of two zeros like `element_spec`, `None` if it is too vague."""
    example = []
    for spec in tf.nest.flatten(element_spec):
        value_specs = getattr(spec, "_value_specs", (spec,))
        part = value_specs[0]
        if not isinstance(part, tf.TensorSpec) or not part.shape.rank:
            return None
        inner = part.shape[1:]
        if not inner.is_fully_defined():
            return None
        example.append(tf.zeros([part.shape[0] or 2, *inner], part.dtype))
    return tf.nest.pack_sequence_as(element_spec, example)


def is_started() -> bool:
    """Whether TensorFlow's runtime runs in this process, with its servers.

    The public functions that could tell would start it.
    """
    return bool(_context.context()._context_handle is not None)


def configure_coordination(
    leader: str, tasks_of_jobs: dict[str, int], timeout_seconds: float
) -> None:
    """Sets up how workers find each other, as TensorFlow's strategy would.

    It does not, if this has been called before. Theirs waits an hour for a
    worker, and reports a lost one in words of its own, which `worker_watch`
    does in ours.
    """
    if _context.context().coordination_service is not None:
        return
    milliseconds = int(timeout_seconds * 1000)
    # Later than `worker_watch` says it, which names the worker.
    heartbeat_milliseconds = 100_000
    _context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=leader,
        cluster_register_timeout_in_ms=milliseconds,
        heartbeat_timeout_in_ms=heartbeat_milliseconds,
        coordinated_jobs=[
            _coordination_config.CoordinatedJob(name=job, num_tasks=count)
            for job, count in tasks_of_jobs.items()
        ],
    )


def publish(key: str, value: str) -> None:
    """Writes into the store that all workers can read.

    The store belongs to TensorFlow's coordination service.
    """
    _context.context().set_config_key_value(key, value)


def read_published(key: str, timeout_seconds: float) -> str:
    """Reads what a worker has published, as soon as it has.

    Raises:
        tf.errors.DeadlineExceededError: If nothing came in time.
    """
    milliseconds = max(1, int(timeout_seconds * 1000))
    return str(_context.context().get_config_key_value(key, milliseconds))


def check_peer(task: str, timeout_seconds: float) -> None:
    """Asks the server of another worker whether it is there.

    Its C++ threads answer, whatever its Python is doing.

    Raises:
        tf.errors.OpError: If it is not, or is another one than before.
    """
    _context.context().check_collective_ops_peer_health(
        task, timeout_in_ms=max(1, int(timeout_seconds * 1000))
    )


def abort_collectives(message: str) -> None:
    """Ends what waits for other workers, now and from now on, in an error."""
    _context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)
