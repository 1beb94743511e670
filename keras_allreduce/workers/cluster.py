"""The cluster: TF_CONFIG, addresses, ranks. No TensorFlow."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_allreduce.addresses import parse_addresses

# The jobs of tf.distribute that train together, in the order of their ranks.
JOBS = ("chief", "worker")

_OTHER_JOBS = ("evaluator", "ps")

_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class Cluster:
    """The workers that train together, and which of them this is.

    Attributes:
        tasks: TensorFlow's name of each worker; the first is the chief.
        addresses: `"host:port"` of each worker.
        rank: Number of this worker in both.
    """

    tasks: tuple[str, ...]
    addresses: tuple[str, ...]
    rank: int

    @property
    def others(self) -> list[int]:
        """Ranks of the other workers."""
        return [r for r in range(len(self.tasks)) if r != self.rank]

    def name(self, rank: int) -> str:
        """A worker as messages call it: `worker 1 (10.0.0.2:12345)`."""
        job, index = self.tasks[rank].removeprefix("/job:").split("/")[::2]
        number = index.removeprefix("task:")
        return f"{job} {number} ({self.addresses[rank]})"

    def names(self, ranks: list[int]) -> str:
        """Several workers, as messages call them."""
        return ", ".join(self.name(rank) for rank in ranks)


def read_tf_config(text: str) -> tuple[Any, Any, Any] | None:
    """Cluster, task type and task index in TF_CONFIG, if there is one.

    Raises:
        ValueError: If it does not have all three.
    """
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
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
        jobs: Addresses of each job: `{"worker": ["10.0.0.1:12345", ...]}`, or
            by index: `{"worker": {"1": "10.0.0.2:12345", ...}}`.
        job: Job of this process, `"chief"` or `"worker"`.
        index: Its number in that job.

    Returns:
        The cluster; `None` if this process trains alone, as the only worker
        or as an evaluator.

    Raises:
        ValueError: If it cannot.
    """
    addresses = addresses_of_jobs(jobs)
    parse_addresses(each for listed in addresses.values() for each in listed)
    # TFJob of Kubeflow leaves the evaluator out of the cluster.
    if job == "evaluator" and job not in addresses:
        return None
    number = _check_task(addresses, job, index)
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


def num_workers(jobs: Any) -> int:
    """Number of workers of a cluster that train together.

    Raises:
        ValueError: If it does not list the addresses of each job.
    """
    addresses = addresses_of_jobs(jobs)
    return sum(len(addresses.get(job, ())) for job in JOBS)


def addresses_of_jobs(jobs: Any) -> dict[str, list[Any]]:
    """Addresses of each job in the order of their indices.

    Raises:
        ValueError: If `jobs` does not list them.
    """
    if not isinstance(jobs, Mapping) or not all(
        isinstance(listed, (list, tuple, Mapping)) for listed in jobs.values()
    ):
        raise ValueError(
            "A cluster lists the addresses of each job, as in "
            f"{_EXAMPLE}. Received: cluster={jobs!r}"
        )
    return {
        name: _in_order(listed) if isinstance(listed, Mapping) else [*listed]
        for name, listed in jobs.items()
    }


def _in_order(by_index: Mapping[Any, Any]) -> list[Any]:
    """Addresses of a job that is a dictionary, whose keys have any order."""
    numbers = {_number(key): address for key, address in by_index.items()}
    if set(numbers) != set(range(len(by_index))):
        raise ValueError(
            "A job that is a dictionary must have the address of each index, "
            f"counted from 0. Received: indices {list(by_index)}"
        )
    return [numbers[index] for index in range(len(numbers))]


def _check_task(
    addresses: Mapping[str, Sequence[Any]], job: Any, index: Any
) -> int:
    """Returns the index as a number."""
    if job not in (*JOBS, *_OTHER_JOBS) or job not in addresses:
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
    return number


def _number(index: Any) -> int | None:
    with contextlib.suppress(TypeError, ValueError):
        return int(index)
    return None
