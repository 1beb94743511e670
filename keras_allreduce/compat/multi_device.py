"""Private names of the iterators of one worker, which read its data.

TensorFlow's iterator that prefetches to several devices traces about eight
functions per device each time it is made. All that changes from one to the next
are three tensors which the functions are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

# The class of all data sets. A public subclass has no way to say which
# variant tensor it stands for.
from tensorflow.python.data.ops.dataset_ops import DatasetV2 as _Dataset

# The iterator, and the data set per device that reads the iterator's shard.
from tensorflow.python.data.ops.multi_device_iterator_ops import (
    OwnedMultiDeviceIterator as _MultiDeviceIterator,
)
from tensorflow.python.data.ops.multi_device_iterator_ops import (
    _PerDeviceGenerator,
)

# A prefetch that leaves slack, as the option `experimental_slack` asks: the
# public one takes no such argument.
from tensorflow.python.data.ops.prefetch_op import (
    _PrefetchDataset,
)

# The full name of a device, and the host that it is on.
from tensorflow.python.distribute import device_util as _device_util

# The part of a distributed iterator for each worker, and what `InputOptions`
# mean for it.
from tensorflow.python.distribute.input_lib import (
    _should_use_multi_device_iterator,
    _SingleWorkerOwnedDatasetIterator,
)

from keras_allreduce.compat.datasets import DistributedDataset


@dataclass(frozen=True)
class Source:
    """The data of one worker of a distributed data set.

    Attributes:
        dataset: A `tf.data.Dataset` of parts: one per replica of this worker,
            the first for the first replica.
        worker: Device on which it is read.
        devices: Devices of the replicas.
        options: The `tf.distribute.InputOptions`, or `None`.
    """

    dataset: Any
    worker: str
    devices: tuple[str, ...]
    options: Any

    @property
    def host(self) -> str:
        """Host device of the worker."""
        return str(
            _device_util.get_host_for_device(
                _device_util.canonicalize(self.worker, _device_util.current())
            )
        )

    @property
    def prefetches(self) -> bool:
        """Whether parts are to be prefetched to the devices."""
        return bool(_should_use_multi_device_iterator(self.options))

    @property
    def buffer_size(self) -> int:
        """Parts per replica that wait in each buffer."""
        if self.options is None:
            return 1
        return int(self.options.experimental_per_replica_buffer_size)

    def make_iterator(self) -> Any:
        """Makes TensorFlow's own iterator."""
        with tf.device(self.worker):
            return _SingleWorkerOwnedDatasetIterator(
                dataset=self.dataset,
                worker=self.worker,
                devices=self.devices,
                options=self.options,
                canonicalize_devices=True,
            )


def sources(dataset: Any) -> list[Source]:
    """The data of each worker of a distributed data set."""
    if isinstance(dataset, DistributedDataset):
        parts = dataset._cloned_datasets
    else:
        parts = dataset._datasets
    workers = dataset._input_workers
    return [
        Source(
            part,
            worker,
            tuple(workers.compute_devices_for_worker(index)),
            dataset._options,
        )
        for index, (part, worker) in enumerate(
            zip(parts, workers.worker_devices, strict=True)
        )
    ]


class DeviceFunctions:
    """The traced functions that fetch a part to each device.

    Args:
        devices: Devices of the replicas of one worker.
        source_device: Host device of that worker.
        dataset: A `tf.data.Dataset` of parts; any of its spec will do.

    Raises:
        TypeError: If the functions are given something that is not known
            here, as may be in another version of TensorFlow.
    """

    def __init__(
        self, devices: Sequence[str], source_device: str, dataset: Any
    ):
        self._devices = tuple(devices)
        self._source_device = source_device
        self._element_spec = dataset.element_spec
        self._flat_structure = dataset._flat_structure
        with tf.device(source_device):
            resource = self._new_resource()
            handle = tf.raw_ops.MultiDeviceIteratorToStringHandle(
                multi_device_iterator=resource
            )
            incarnation = tf.constant(0, tf.int64)
        source = tf.constant(source_device)
        self._generators = []
        for index, device in enumerate(self._devices):
            with tf.device(device):
                self._generators.append(
                    _PerDeviceGenerator(
                        index,
                        resource,
                        incarnation,
                        source,
                        self._element_spec,
                        iterator_is_anonymous=True,
                    )
                )
        # Of this iterator, which is never read, by name.
        self._given = {
            "resource": resource,
            "incarnation": incarnation,
            "source": source,
            "handle": handle,
        }
        for generator in self._generators:
            for arguments in _arguments(generator):
                for tensor in arguments:
                    self._what(tensor)

    def make(self, dataset: Any, source: Source) -> Any:
        """Makes an iterator of `dataset`; traces nothing.

        Args:
            dataset: A `tf.data.Dataset` of parts, with the spec of these
                functions.
            source: Where it is read, and how far ahead.

        Returns:
            The part of a distributed iterator for one worker.
        """
        with tf.device(self._source_device):
            resource = self._new_resource()
            given = self._given | {
                "resource": resource,
                "handle": tf.raw_ops.MultiDeviceIteratorToStringHandle(
                    multi_device_iterator=resource
                ),
                "incarnation": tf.raw_ops.MultiDeviceIteratorInit(
                    dataset=dataset._variant_tensor,
                    multi_device_iterator=resource,
                    max_buffer_size=max(source.buffer_size, 1),
                ),
            }
        slack = dataset.options().experimental_slack
        iterators = []
        for generator, device in zip(
            self._generators, self._devices, strict=True
        ):
            arguments = [
                [given[self._what(tensor)] for tensor in tensors]
                for tensors in _arguments(generator)
            ]
            with tf.device(device):
                part = _Generator(generator, arguments)
                part = _prefetched(part, source.buffer_size, slack)
                iterators.append(iter(part))
        return self._owner([resource, *iterators], dataset, source)

    def _owner(
        self, components: Sequence[Any], dataset: Any, source: Source
    ) -> Any:
        iterator = _MultiDeviceIterator(
            devices=self._devices,
            source_device=self._source_device,
            components=list(components),
            element_spec=self._element_spec,
        )
        owner = _SingleWorkerOwnedDatasetIterator(
            worker=source.worker,
            devices=self._devices,
            components=[iterator],
            element_spec=self._element_spec,
            options=source.options,
            canonicalize_devices=True,
        )
        # It holds the Python functions that it calls.
        owner._dataset = dataset
        return owner

    def _new_resource(self) -> tf.Tensor:
        return tf.raw_ops.AnonymousMultiDeviceIteratorV3(
            devices=list(self._devices), **self._flat_structure
        )

    def _what(self, tensor: tf.Tensor) -> str:
        """Which of the given tensors an argument is."""
        for name, given in self._given.items():
            if tensor is given:
                return name
        handle = self._given["handle"]
        if tensor.dtype == tf.string and bool(tensor == handle):
            return "handle"
        raise TypeError(
            "The functions of a multi-device iterator must be given its "
            f"handle, resource, incarnation and source. Received: {tensor}"
        )


class _Generator(_Dataset):
    """The data set of one device, over another multi-device iterator."""

    def __init__(self, generator: Any, arguments: Sequence[Any]):
        self._element_spec = generator.element_spec
        # Keeps the functions.
        self._generator = generator
        init, following, finalize = arguments
        super().__init__(
            tf.raw_ops.GeneratorDataset(
                init_func_other_args=init,
                next_func_other_args=following,
                finalize_func_other_args=finalize,
                init_func=generator._init_func,
                next_func=generator._next_func,
                finalize_func=generator._finalize_func,
                **generator._flat_structure,
            )
        )

    def _inputs(self) -> list[Any]:
        return []

    @property
    def element_spec(self) -> Any:
        """Spec of the parts."""
        return self._element_spec


def _arguments(generator: Any) -> tuple[Any, Any, Any]:
    return (
        generator._init_captured_args,
        generator._next_captured_args,
        generator._finalize_captured_args,
    )


def _prefetched(dataset: Any, buffer_size: int, slack: bool) -> Any:
    """`dataset` prefetched, without a tuning thread."""
    if buffer_size > 0 and slack:
        dataset = _PrefetchDataset(dataset, buffer_size, slack_period=1)
    elif buffer_size > 0:
        dataset = dataset.prefetch(buffer_size, name="device_prefetch")
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
