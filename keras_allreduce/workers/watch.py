"""Starts the watchdog of a strategy, and the store that fails with it."""

from typing import Any

from keras_allreduce.workers import exit_message
from keras_allreduce.workers.board import Board
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.heartbeats import FROZEN_SECONDS, Heartbeats
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.lookout import Lookout
from keras_allreduce.workers.store import NoStore, Store, store_of
from keras_allreduce.workers.watchdog import Watchdog
from keras_allreduce.workers.whereabouts import Whereabouts


def watch(
    cluster: Cluster,
    owner: Any,
    timeout_seconds: float,
    in_flight: InFlight,
    whereabouts: Whereabouts,
) -> tuple[Watchdog, Store | NoStore]:
    """Watches the other workers for as long as `owner` is there.

    Args:
        cluster: The workers.
        owner: A strategy.
        timeout_seconds: How long a worker waits for the others.
        in_flight: Tracks the collectives.
        whereabouts: Where in its script this worker is.

    Returns:
        The watchdog, and the store, whose readers fail when it gives up.
    """
    store = store_of(
        cluster,
        timeout_seconds,
        failure=lambda: watchdog.failure(),
        cause=lambda: watchdog.cause(),
    )
    heartbeats = Heartbeats(cluster, min(timeout_seconds, FROZEN_SECONDS))
    board = lookout = None
    if isinstance(store, Store):
        board = Board(cluster, store.number, heartbeats.answers)
        lookout = Lookout(cluster, whereabouts, board)
    watchdog = Watchdog(
        cluster, timeout_seconds, in_flight, heartbeats, board, lookout
    )
    exit_message.install(watchdog)
    watchdog.start(owner)
    return watchdog, store
