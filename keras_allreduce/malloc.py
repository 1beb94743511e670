"""Freed memory stays with the process, where the C library can be told so.

Every step on logical CPU devices makes gradients of several megabytes, and what
crosses between workers passes through buffers as large. By default glibc takes
such a buffer from the system and gives it back each time, and the system clears
and maps every page of it anew: that took longer than summing and sending (see
"Freed memory" in benchmarks/RESULTS.md).
"""

import ctypes
import os
import platform

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

_SETTINGS = {
    _M_MMAP_THRESHOLD: 2**30,
    _M_TRIM_THRESHOLD: 2**30,
    _M_TOP_PAD: 2**26,
}

_OF_THE_USER = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)


def keep_freed() -> bool:
    """Lets the process keep up to 1 GiB of freed memory for its next buffers.

    Leaves everything as it is where the C library is not glibc, or where the
    environment says how it should be (`MALLOC_TRIM_THRESHOLD_`, ... or
    `GLIBC_TUNABLES`; see mallopt(3)).

    Returns:
        Whether it did.
    """
    asked = any(name in os.environ for name in _OF_THE_USER)
    asked = asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if asked or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(name, value) for name, value in _SETTINGS.items()]
    return all(done)
