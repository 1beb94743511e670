"""How long the tests wait for other processes, in seconds: here alone.

A deadline ends what hangs; no test asserts how fast something is. They hold on
a machine that is ten times slower, because it is busy or old.
"""

DEADLINE_SECONDS = 600

PATIENCE_SECONDS = 8
"""When a worker that does not answer has failed, where a test freezes one."""


def seconds_for(cases):
    """Deadline of processes that train several cases, one after the other."""
    return DEADLINE_SECONDS + 60 * len(cases)
