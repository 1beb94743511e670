"""Which worker of a job this process is."""

import json
import os


def worker_index():
    """Number of this worker; 0 in the process of the tests."""
    if "TF_CONFIG" in os.environ:
        return json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return int(next((os.environ[n] for n in names if n in os.environ), 0))


def is_worker():
    """Whether others train with this process."""
    names = {"TF_CONFIG", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}
    return bool(names & set(os.environ))
