"""The health monitor: its clock, its timeout, and what it does in the end."""

import pytest

from keras_allreduce.workers import health
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.errors import (
    WorkerLostError,
    WorkersDifferError,
    from_tagged,
)
from keras_allreduce.workers.health import (
    AwakeClock,
    CollectiveTimeout,
    HealthMonitor,
)
from keras_allreduce.workers.in_flight import Reading

CLUSTER = Cluster(
    tuple(f"/job:worker/replica:0/task:{rank}" for rank in range(2)),
    ("a:1", "b:1"),
    0,
)


@pytest.fixture
def machine(monkeypatch):
    """`now` of the machine's clock, which the test moves."""

    class Machine:
        now = 100.0

        def monotonic(self):
            return self.now

    fake = Machine()
    monkeypatch.setattr(health, "time", fake)
    return fake


def test_a_clock_that_is_looked_at_goes_as_the_machines(machine):
    clock = AwakeClock()
    for _ in range(1000):
        machine.now += 0.5
        clock.look()
    machine.now += 0.25
    assert clock() == 500.25


def test_a_clock_stands_still_while_the_process_is_suspended(machine):
    clock = AwakeClock()
    machine.now += 130.0
    # Whoever asks first, the monitor or another thread.
    assert clock() == 3.0
    clock.look()
    machine.now += 1.0
    assert clock() == 4.0


def test_a_clock_that_nobody_looks_at_any_more_goes_on(machine):
    clock = AwakeClock()
    clock.let_go()
    machine.now += 600.0
    assert clock() == 600.0


class FakeInFlight:
    def __init__(self):
        self.reading = Reading(0, 0, 0.0)

    def read(self):
        return self.reading


class FakeHeartbeats:
    are_unsure = False
    needs_all = False

    def __init__(self, error=None, silent=()):
        self.error, self.silent = error, silent
        self.heard = 0

    def check(self, *, all_now=False):
        return self.error

    def unanswered(self):
        return self.silent

    def heard_all(self):
        self.heard += 1


class FakeInspector:
    """Knows which workers are behind, or finds an error."""

    def __init__(self, *behind, error=None):
        self._behind, self._error = behind, error

    def behind(self):
        return self._behind

    def check(self):
        return self._error

    def say_failure(self, error, seconds):
        pass


def test_a_collective_may_take_as_long_as_the_user_says():
    in_flight = FakeInFlight()
    timeout = CollectiveTimeout(in_flight, 60.0, FakeHeartbeats(), None)
    in_flight.reading = Reading(5, 4, 59.0)
    assert timeout.check() is None
    in_flight.reading = Reading(5, 4, 60.0)
    assert "within timeout_seconds=60." in str(timeout.check())


def test_collectives_that_end_are_told():
    in_flight, heartbeats = FakeInFlight(), FakeHeartbeats()
    timeout = CollectiveTimeout(in_flight, 60.0, heartbeats, None)
    timeout.check()
    assert heartbeats.heard == 0
    for count in (4, 4, 6):
        in_flight.reading = Reading(6, count, 0.0)
        timeout.check()
    assert heartbeats.heard == 2


AT_WORK = "worker 2 (c:1) is at work (fit, epoch 1 of 5)"
SILENT = "worker 1 (b:1) has not answered for 18 s: it is frozen"


@pytest.mark.parametrize(
    ("silent", "inspector", "received"),
    [
        ([SILENT], FakeInspector(AT_WORK), f"{SILENT}. Look at its log"),
        (
            [],
            FakeInspector(AT_WORK, AT_WORK),
            f"all workers answer; {AT_WORK}; {AT_WORK}. Give all",
        ),
        ([], FakeInspector(), "all workers answer, and have begun as many"),
        ([], None, "all workers answer. Give all"),
    ],
    ids=["silent", "behind", "as far", "nothing is published"],
)
def test_a_timeout_says_what_is_known_of_the_others(
    silent, inspector, received
):
    in_flight = FakeInFlight()
    in_flight.reading = Reading(5, 4, 18.0)
    timeout = CollectiveTimeout(
        in_flight, 18.0, FakeHeartbeats(silent=silent), inspector
    )
    assert f"timeout_seconds=18. Received: {received}" in str(timeout.check())


class FakeRuntime:
    def __init__(self):
        self.aborted = []

    def abort_collectives(self, message):
        self.aborted.append(message)


@pytest.fixture
def runtime(monkeypatch):
    fake = FakeRuntime()
    monkeypatch.setattr(health, "runtime", fake)
    return fake


class Finds:
    def __init__(self, error):
        self.error = error

    def check(self):
        return self.error


def test_the_first_failure_counts_and_ends_all_that_waits(runtime):
    why = WorkersDifferError("why")
    monitor = HealthMonitor(
        CLUSTER, AwakeClock(), FakeHeartbeats(), None, [Finds(why).check]
    )
    ended = []
    monitor.on_loss.append(lambda: ended.append(1))
    monitor._run()
    assert str(monitor.failure()) == "why"
    assert type(monitor.failure()) is WorkersDifferError
    (message,) = runtime.aborted
    assert str(from_tagged(message)) == "why"
    assert ended == [1]
    assert str(monitor.cause()) == "why"


def test_what_another_has_said_counts_more_than_that_it_is_late(runtime):
    why = WorkerLostError("worker 1 (b:1) has failed")
    late = Finds(WorkersDifferError("late"))
    monitor = HealthMonitor(
        CLUSTER,
        AwakeClock(),
        FakeHeartbeats(),
        FakeInspector(error=why),
        [late.check],
    )
    monitor._run()
    assert str(monitor.failure()) == "worker 1 (b:1) has failed"


def test_a_closed_port_is_asked_again_before_others_are_asked(runtime):
    class Unsure(FakeHeartbeats):
        left = 3

        def check(self, *, all_now=False):
            self.left -= 1
            self.are_unsure = self.left > 0
            return WorkerLostError("gone") if not self.left else None

    asked = []
    monitor = HealthMonitor(
        CLUSTER, AwakeClock(), Unsure(), None, [lambda: asked.append(1)]
    )
    monitor._run()
    assert str(monitor.failure()) == "gone"
    assert asked == []


def test_a_collective_that_failed_asks_the_others_at_once(runtime):
    heartbeats = FakeHeartbeats(WorkerLostError("worker 1 is gone"))
    monitor = HealthMonitor(CLUSTER, AwakeClock(), heartbeats, None)
    assert str(monitor.cause()) == "worker 1 is gone"
    assert heartbeats.needs_all


def test_a_monitor_that_was_stopped_blames_nobody(runtime):
    heartbeats = FakeHeartbeats(WorkerLostError("worker 1 is gone"))
    monitor = HealthMonitor(CLUSTER, AwakeClock(), heartbeats, None)
    monitor.say_goodbye(0.0)
    assert monitor.cause() is None
    assert runtime.aborted == []
