"""Before TensorFlow starts: who the workers are, and that all are there."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_allreduce import internals
from keras_allreduce.worker_limit import limited
from keras_allreduce.worker_meeting import Cluster, meet

# The jobs of tf.distribute that train together, in the order of their ranks.
JOBS = ("chief", "worker")

_OTHER_JOBS = ("evaluator", "ps")

_LATER_THAN_TENSORFLOW_SECONDS = 5

_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def read_cluster(resolver: Any) -> Cluster | None:
    """The workers that a cluster resolver, or TF_CONFIG, describes.

    Args:
        resolver: A `tf.distribute.cluster_resolver.ClusterResolver`, or
            `None` for TF_CONFIG.

    Returns:
        The cluster; `None` if this process trains alone.

    Raises:
        ValueError: If the description cannot be right.
    """
    reads_environment = resolver is None or isinstance(
        resolver, tf.distribute.cluster_resolver.TFConfigClusterResolver
    )
    if reads_environment:
        described = _tf_config(os.environ.get("TF_CONFIG", ""))
        if described is None:
            return None
        jobs, job, index = described
        # Arguments of the resolver go before TF_CONFIG.
        job = getattr(resolver, "task_type", None) or job
        asked = getattr(resolver, "task_id", None)
        index = index if asked is None else asked
    else:
        jobs = resolver.cluster_spec().as_dict()
        job, index = resolver.task_type, resolver.task_id
        if not jobs:
            return None
    return check_cluster(jobs, job, index)


def _tf_config(text: str) -> tuple[Any, Any, Any] | None:
    """Cluster, task type and task index in TF_CONFIG, if there is one."""
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"TF_CONFIG must be JSON, such as {_EXAMPLE}. Received: {text!r}, "
            f"which is not ({error})."
        ) from None
    if config == {} or (
        isinstance(config, dict) and config.get("cluster") == {}
    ):
        return None
    if not isinstance(config, dict) or "cluster" not in config:
        raise ValueError(
            f"TF_CONFIG must have a `cluster`, as in {_EXAMPLE}. "
            f"Received: {text!r}. Unset TF_CONFIG to train on one worker."
        )
    task = config.get("task")
    if not isinstance(task, dict) or not {"type", "index"} <= set(task):
        raise ValueError(
            "TF_CONFIG must have a `task` with `type` and `index`, which say "
            f"which worker this is, as in {_EXAMPLE}. Received: {text!r}"
        )
    return config["cluster"], task["type"], task["index"]


def check_cluster(jobs: Any, job: Any, index: Any) -> Cluster | None:
    """Returns the cluster if TensorFlow can start with it.

    Args:
        jobs: Addresses of each job: `{"worker": ["10.0.0.1:12345", ...]}`.
        job: Job of this process, `"chief"` or `"worker"`.
        index: Its number in that job.

    Returns:
        The cluster; `None` if this process trains alone.

    Raises:
        ValueError: If it cannot.
    """
    known = (*JOBS, *_OTHER_JOBS)
    if not isinstance(jobs, dict) or not all(
        isinstance(listed, (list, tuple, dict)) for listed in jobs.values()
    ):
        raise ValueError(
            "A cluster lists the addresses of each job, as in "
            f"{_EXAMPLE}. Received: cluster={jobs!r}"
        )
    addresses = {
        name: list(listed.values() if isinstance(listed, dict) else listed)
        for name, listed in jobs.items()
    }
    if job not in known or job not in addresses:
        raise ValueError(
            "The type of a task is one of the jobs of the cluster, "
            f"'worker' as a rule. Received: type={job!r}, with jobs "
            f"{sorted(addresses)}."
        )
    number = _number(index)
    if number is None or not 0 <= number < len(addresses[job]):
        raise ValueError(
            f"The index of a task counts the addresses of {job!r} from 0 on, "
            f"{len(addresses[job])} of them. Received: index={index!r}"
        )
    everyone = [each for listed in addresses.values() for each in listed]
    for address in everyone:
        _check_address(address)
    twice = sorted({each for each in everyone if everyone.count(each) > 1})
    if twice:
        raise ValueError(
            "Every worker has an address of its own. Received: "
            f"{', '.join(twice)}, listed twice. On one machine each needs "
            "another port."
        )
    if job not in JOBS:
        return None
    members = [
        (f"/job:{name}/replica:0/task:{position}", address)
        for name in JOBS
        for position, address in enumerate(addresses.get(name, ()))
    ]
    if len(members) == 1:
        return None
    tasks, listed = zip(*members, strict=True)
    return Cluster(
        tasks, listed, tasks.index(f"/job:{job}/replica:0/task:{number}")
    )


def _number(index: Any) -> int | None:
    with contextlib.suppress(TypeError, ValueError):
        return int(index)
    return None


def _check_address(address: Any) -> None:
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            "The address of a worker is a host and a port, such as "
            f"'10.0.0.1:12345'. Received: {address!r}"
        )


@contextlib.contextmanager
def starting(resolver: Any, timeout_seconds: float) -> Iterator[Cluster | None]:
    """Checks before TensorFlow's own set-up, which runs in the block.

    Args:
        resolver: See `read_cluster`.
        timeout_seconds: How long to wait for the other workers.

    Yields:
        The cluster; `None` if this process trains alone.

    Raises:
        ValueError: If the description of the cluster cannot be right.
        RuntimeError: If the workers cannot meet.
    """
    cluster = read_cluster(resolver)
    # A second strategy uses the server that is there.
    if cluster is None or internals.is_started():
        yield cluster
        return
    meet(cluster, timeout_seconds)
    jobs = [task.removeprefix("/job:").split("/")[0] for task in cluster.tasks]
    internals.configure_coordination(
        cluster.tasks[0],
        {job: jobs.count(job) for job in JOBS if job in jobs},
        timeout_seconds,
    )
    # TensorFlow has the same limit, but not wherever it waits.
    limit = limited(
        timeout_seconds + _LATER_THAN_TENSORFLOW_SECONDS,
        "keras_allreduce: All workers must stay while they connect. Received: "
        f"{cluster.name(cluster.rank)} still waits for one that is lost. Look "
        "for the worker whose log ends first, and start all again.",
    )
    try:
        with limit:
            yield cluster
    except tf.errors.OpError as error:
        raise RuntimeError(
            "All workers must stay while they connect. Received: "
            f"{error.message.splitlines()[0]}, in {cluster.name(cluster.rank)}"
            ". Look for the worker whose log ends first, and start all again."
        ) from error
