"""Says that a worker waits, where nothing else would be said for minutes."""

import contextlib
import threading
from collections.abc import Iterator

from absl import logging

_SILENT_SECONDS = 15.0


@contextlib.contextmanager
def waits_for_start(worker: str, timeout_seconds: float) -> Iterator[None]:
    """Says once that the others are not there, if the block takes long.

    Args:
        worker: What messages call this worker.
        timeout_seconds: How long the block may take.
    """
    said = threading.Timer(
        _SILENT_SECONDS,
        logging.warning,
        (
            "keras_allreduce: %s waits for the other workers to start, for at "
            "most timeout_seconds=%g.",
            worker,
            timeout_seconds,
        ),
    )
    said.daemon = True
    said.start()
    try:
        yield
    finally:
        said.cancel()
