"""Device names: parses, checks and makes them; runs ops on each device."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf


def names_of(devices: Iterable[Any]) -> list[str]:
    """Names of devices, as `tf.distribute.MirroredStrategy` takes them.

    Does not start TensorFlow.

    Args:
        devices: Iterable of device names and `tf.config.LogicalDevice`s.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(devices, str) and isinstance(devices, Iterable):
        listed = list(devices)
        names = [
            device.name
            if isinstance(device, tf.config.LogicalDevice)
            else device
            for device in listed
        ]
        if all(isinstance(name, str) for name in names):
            return names
        devices = listed
    raise TypeError(
        "`devices` must be a list of device names, such as "
        "['/gpu:0', '/gpu:1'], or of what tf.config.list_logical_devices "
        f"returns. Received: devices={devices!r}"
    )


def check_devices(devices: Sequence[str]) -> None:
    """Raises if a strategy cannot train on `devices`.

    Raises:
        ValueError: If it is empty, mixes GPUs and logical CPU devices, names a
            device twice, or one that is not there.
    """
    if not devices:
        raise ValueError(
            "`devices` must name at least one device. Received: devices=[]. "
            "Leave it out to use all GPUs."
        )
    kinds_and_indices = [_parse(device) for device in devices]
    if len({kind for kind, _ in kinds_and_indices}) > 1:
        raise ValueError(
            "All devices must be of one kind, GPU or CPU. Received: "
            f"devices={devices}. Pass those of one kind."
        )
    if len(set(kinds_and_indices)) < len(devices):
        raise ValueError(
            "Every device can hold one replica only. Received: "
            f"devices={devices}, which names one twice."
        )
    for device, (kind, index) in zip(devices, kinds_and_indices, strict=True):
        _check_is_there(device, kind, index)


def _check_is_there(device: str, kind: str, index: int) -> None:
    there = len(tf.config.list_logical_devices(kind))
    if index >= there:
        hint = (
            f"keras_allreduce.host_devices({index + 1}) makes logical CPU "
            "devices."
            if kind == "CPU"
            else "tf.config.list_logical_devices('GPU') lists them."
        )
        raise ValueError(
            f"Every device must be there. Received: {device!r}, but "
            f"TensorFlow sees {there} of kind {kind}. {hint}"
        )


def _parse(device: str) -> tuple[str, int]:
    try:
        spec = tf.DeviceSpec.from_string(device)
    except ValueError:
        spec = tf.DeviceSpec()
    if spec.device_type not in ("CPU", "GPU"):
        raise ValueError(
            "A device name says GPU or CPU and a number, such as '/gpu:0'. "
            f"Received: {device!r}"
        )
    return spec.device_type, spec.device_index or 0


def _worker_of(device: str) -> tuple[str | None, int | None]:
    spec = tf.DeviceSpec.from_string(device)
    return spec.job, spec.task


def is_gpu(device: str) -> bool:
    """Whether a device name is of a GPU."""
    return "GPU" in device.upper()


def on_each(
    devices: Sequence[str], function: Callable[..., Any], *values: Sequence[Any]
) -> list[Any]:
    """Calls `function` on each device with its part of all `values`.

    Args:
        devices: Names of devices.
        function: Takes one argument for each of `values`.
        *values: One value per device each.

    Returns:
        What `function` returned, one per device.
    """
    made = []
    for device, *parts in zip(devices, *values, strict=True):
        with tf.device(device):
            made.append(function(*parts))
    return made


def on_gpus(devices: Sequence[str] | None = None) -> bool:
    """Whether a strategy for `devices` has GPUs; does not start TensorFlow.

    Args:
        devices: Names of devices. `None`: all GPUs, or else the host.
    """
    if devices is None:
        return bool(tf.config.get_visible_devices("GPU"))
    return is_gpu(str(devices))


def are_virtual(gpus: Sequence[str]) -> bool:
    """Whether TensorFlow has more GPUs than there are, on this machine.

    Args:
        gpus: Names of GPUs, which include the worker if there are
            several: TensorFlow lists those of all.
    """
    worker = _worker_of(gpus[0])
    there = tf.config.list_logical_devices("GPU")
    here = [
        device
        for device in there
        if worker in ((None, None), _worker_of(device.name))
    ]
    return len(tf.config.list_physical_devices("GPU")) < len(here)


def host_devices(count: int) -> list[str]:
    """Creates logical CPU devices, to run replicas without GPUs.

    They share the cores of the machine: results are correct, not faster.

    Args:
        count: Number of logical CPU devices.

    Returns:
        Their names, for `AllReduceStrategy(devices=...)`.

    Raises:
        ValueError: If `count` is not a positive integer.
        RuntimeError: If TensorFlow has already started with fewer: devices
            can only be created before its first use.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            "The number of logical CPU devices must be a positive integer. "
            f"Received: count={count!r}"
        )
    host = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(host) or ()
    if len(configured) < count:
        try:
            tf.config.set_logical_device_configuration(
                host, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError:
            there = len(tf.config.list_logical_devices("CPU"))
            raise RuntimeError(
                "Host devices must be made before TensorFlow is first used. "
                f"Received: host_devices({count}), but TensorFlow has already "
                f"started with {there}. Call it right after the imports."
            ) from None
    global _asked
    _asked = max(_asked, count)
    return [f"/cpu:{index}" for index in range(count)]


_asked = 1


def num_asked_host_devices() -> int:
    """The count that `host_devices` was asked for; 1 if it was not.

    A process may have more, which `tf.config` made for something else.
    """
    return _asked
