"""Every time limit between workers, in one table. No TensorFlow.

    tick < waiting < linger_failed < linger < silent < coordination

A worker publishes its progress within a tick once it has waited for `waiting`;
one that fails lingers until the others have had time to read why; one that is
silent for `silent` has failed, which TensorFlow would notice much later and
say without a name. `timeout_seconds` of the strategy is the user's and longer
than all of them but the last.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Time limits, all in seconds.

    Attributes:
        timeout: Default of `timeout_seconds`.
        connect: A TCP connection is made, or an answer is written.
        report: All bytes of a message before the start have arrived.
        retry: Pause before the next attempt to reach the chief.
        late_chief: The chief's time may have begun so much later.
        late_tensorflow: TensorFlow has the same limit, but not wherever it
            waits; this much later the process is ended from outside.
        quiet_start: Workers that wait for the others to start say so.
        poll: One read of the store; failures are looked for in between.
        read: One read of another's progress.
        read_by_chief: The same, on the worker that holds the store.
        write: Progress is written.
        tick: Pause between two looks of the health monitor.
        waiting: A worker that waits for less does not publish it.
        check: Pause between two heartbeats of a worker.
        check_waiting: The same, while this worker waits.
        answers: A look waits for answers to heartbeats; later ones are taken
            by the next.
        pause: Between two attempts to take them.
        moment: A worker answers, where only an answer at once counts.
        unanswered: A worker that has not answered for so long is named where
            `timeout_seconds` ends the job.
        silent: A worker that has not answered for so long has failed.
        suspended: A look that comes so much later than it was due shows that
            this process was suspended.
        refused: Pause before a closed port is asked again.
        coordination: TensorFlow's coordination service ends a job, one of
            whose workers was not heard, or was suspended, for so long.
        preempted: TensorFlow publishes a SIGTERM that came while it connected.
        linger: A script that has ended well waits until the others know.
        linger_failed: One that has failed waits until they know.
        last_write: The last word of a worker is written.
        after_cause: A worker that fails of another's error ends this much
            later, because launchers name the process that ends first.
        tear_down: TensorFlow's tear-down, which waits for the other workers.
        finalize: MPI ends after the script has failed.
    """

    timeout: float = 600.0

    connect: float = 2.0
    report: float = 10.0
    retry: float = 0.1
    late_chief: float = 5.0
    late_tensorflow: float = 5.0
    quiet_start: float = 15.0

    poll: float = 1.0
    read: float = 0.5
    read_by_chief: float = 0.1
    write: float = 1.0

    tick: float = 0.5
    waiting: float = 1.0
    check: float = 2.0
    check_waiting: float = 1.0
    answers: float = 0.1
    pause: float = 0.005
    moment: float = 0.5
    unanswered: float = 3.0
    silent: float = 20.0
    suspended: float = 3.0
    refused: float = 0.3
    coordination: float = 86_400.0
    preempted: float = 10.0

    linger: float = 10.0
    linger_failed: float = 2.0
    last_write: float = 2.0
    after_cause: float = 1.0
    tear_down: float = 20.0
    finalize: float = 2.0


TIMING = Timing()
