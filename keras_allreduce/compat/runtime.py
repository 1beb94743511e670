"""Private names of TensorFlow's runtime: coordination service and peers."""

import contextlib
import threading
from concurrent.futures import Future

import tensorflow as tf

# The messages in which the coordination service is configured. Their own
# module has moved between versions of TensorFlow.
from tensorflow.python.distribute.collective_all_reduce_strategy import (
    coordination_config_pb2 as _coordination_config,
)

# TensorFlow's runtime, which has the store and the servers of the workers. A
# strategy uses both and shows neither.
from tensorflow.python.eager import context as _context

# Whether ops are to be deterministic can be set, but not asked for, in public.
from tensorflow.python.framework.config import (
    is_op_determinism_enabled as _is_op_determinism_enabled,
)

# Where TensorFlow's preemption notifier publishes the worker.
_PREEMPTION_KEY = "TF_DEFAULT_PREEMPTION_NOTICE_KEY"


def has_clock() -> bool:
    """Whether ops can take the time: not under `enable_op_determinism()`."""
    return not _is_op_determinism_enabled()


def is_started() -> bool:
    """Whether TensorFlow's runtime runs in this process, with its servers.

    The public functions that could tell would start it.
    """
    return bool(_context.context()._context_handle is not None)


def configure_coordination(
    leader: str,
    tasks_of_jobs: dict[str, int],
    timeout_seconds: float,
    heartbeat_seconds: float,
) -> None:
    """Sets up how workers find each other, as TensorFlow's strategy would.

    It does not, if this has been called before. Theirs waits an hour for a
    worker, and reports a lost one in words of its own, which our health
    monitor does in ours.

    Args:
        leader: Task of the chief.
        tasks_of_jobs: Number of the tasks of each job.
        timeout_seconds: How long the workers may take to come.
        heartbeat_seconds: A worker that was not heard for so long ends the
            job, and so does one that was suspended for so long.
    """
    if _context.context().coordination_service is not None:
        return
    milliseconds = int(timeout_seconds * 1000)
    _context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=leader,
        cluster_register_timeout_in_ms=milliseconds,
        heartbeat_timeout_in_ms=int(heartbeat_seconds * 1000),
        coordinated_jobs=[
            _coordination_config.CoordinatedJob(name=job, num_tasks=count)
            for job, count in tasks_of_jobs.items()
        ],
    )


def has_store() -> bool:
    """Whether workers can publish: the coordination service is not off.

    TensorFlow's own tests switch it off with an empty `service_type`.
    """
    config = _context.context().coordination_service
    return config is not None and bool(config.service_type)


def publish(key: str, value: str, *, overwrite: bool = False) -> "Future[None]":
    """Writes into the store that all workers can read.

    The store belongs to TensorFlow's coordination service. Writing has no time
    limit, and does not end if the link to the chief is cut; hence in a thread
    of its own, which does not keep the process.

    Args:
        key: Under which nothing has been written, without `overwrite`.
        value: Any text.
        overwrite: Whether an older value may be there. Readers wait between
            the two.

    Returns:
        Is done when the value is there; its exception is a `tf.errors.OpError`.
    """
    written: Future[None] = Future()

    def write() -> None:
        context = _context.context()
        try:
            if overwrite:
                with contextlib.suppress(tf.errors.NotFoundError):
                    context.delete_config_key_value(key)
            context.set_config_key_value(key, value)
        except tf.errors.OpError as error:
            written.set_exception(error)
        else:
            written.set_result(None)

    threading.Thread(
        target=write, name="keras_allreduce.publish", daemon=True
    ).start()
    return written


def read_published(key: str, timeout_seconds: float) -> str:
    """Reads the text of a worker, as soon as it is published.

    Raises:
        tf.errors.DeadlineExceededError: If nothing came in time.
    """
    milliseconds = max(1, int(timeout_seconds * 1000))
    return str(_context.context().get_config_key_value(key, milliseconds))


def was_preempted(task: str, timeout_seconds: float) -> bool:
    """Whether TensorFlow has heard a SIGTERM in a worker.

    It publishes one within a second of hearing it.

    Args:
        task: Name of the worker, such as `"/job:worker/replica:0/task:1"`.
        timeout_seconds: How long to wait for an answer.
    """
    with contextlib.suppress(tf.errors.OpError):
        heard = read_published(_PREEMPTION_KEY, timeout_seconds)
        return heard == task.replace("/replica:0", "")
    return False


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


def has_global_seed() -> bool:
    """Whether `tf.random.set_seed` was called, by Keras for one."""
    return _context.global_seed() is not None
