"""The process keeps what it frees, unless the environment decides."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Writes 16 MiB a few times. Without keeping, each time every page is new.
SCRIPT = """
import ctypes, resource
from keras_allreduce.malloc import keep_freed
kept = keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    block = libc.malloc(ctypes.c_size_t(2**24))
    ctypes.memset(block, 1, 2**24)
    libc.free(ctypes.c_void_p(block))
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)


def run(**environment):
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PATH": "", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept, new_pages = output.split()
    return kept == "True", int(new_pages)


@on_glibc
def test_a_buffer_that_was_freed_is_used_again():
    kept, new_pages = run()
    assert kept
    assert new_pages < 4096  # Those of one buffer of five.


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_TOP_PAD_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_says_stays(environment):
    kept, _ = run(**environment)
    assert not kept
