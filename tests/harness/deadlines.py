"""How long the tests wait for other processes, in seconds: here alone.

A deadline ends what hangs; no test asserts how fast something is. They hold on
a machine that is ten times slower, because it is busy or old.
"""

import time

DEADLINE_SECONDS = 600

PATIENCE_SECONDS = 8
"""When a worker that does not answer has failed, where a test freezes one."""


def wait_until(holds, unless="It never happened."):
    """Returns once `holds()` is true.

    Args:
        holds: Function that looks.
        unless: What the failure says if the deadline comes first; a function
            returns it then.
    """
    end = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < end, unless() if callable(unless) else unless
        time.sleep(0.01)


def seconds_for(cases):
    """Deadline of processes that train several cases, one after the other."""
    return DEADLINE_SECONDS + 60 * len(cases)
