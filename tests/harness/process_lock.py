"""Whether processes still run, of which each holds a shared lock on a file.

Unlike a process id, a lock is let go at the death, whoever reaps it.
"""

import fcntl

from deadlines import wait_until


def is_none_left(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_until_none_is_left(path):
    wait_until(lambda: is_none_left(path), "A process is left.")
