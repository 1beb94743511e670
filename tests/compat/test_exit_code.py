"""Whether `sys.exit` ends a process, in processes that it may end."""

import subprocess
import sys

import pytest

PROCESS = """
import atexit, sys, threading
from keras_allreduce.compat import exit_code

exit_code.install()
atexit.register(lambda: print("known:", exit_code.code(), flush=True))
"""

SCRIPTS = {
    "a number": ("sys.exit(3)", 3, 3),
    "no number": ("sys.exit()", 0, 0),
    "none": ("sys.exit(None)", 0, 0),
    "a text": ("sys.exit('no data')", 1, 1),
    "of a main": ("def main(): return 4\nsys.exit(main())", 4, 4),
    "through finally": ("try: sys.exit(3)\nfinally: pass", 3, 3),
    "raised again": ("try: sys.exit(3)\nexcept SystemExit: raise", 3, 3),
    "caught": ("try: sys.exit(3)\nexcept SystemExit: pass", 0, 0),
    "caught and kept": (
        "try: sys.exit(3)\nexcept SystemExit as error: kept = error",
        0,
        0,
    ),
    "caught, then another": (
        "try: sys.exit(3)\nexcept SystemExit: pass\nsys.exit(5)",
        5,
        5,
    ),
    "of a thread": (
        "t = threading.Thread(target=sys.exit, args=[3])\nt.start(); t.join()",
        0,
        0,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_code_of_sys_exit_is_known_if_it_ends_the_process(name):
    script, code, known = SCRIPTS[name]
    done = subprocess.run(
        [sys.executable, "-c", f"{PROCESS}\n{script}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout == f"known: {known}\n"
    assert done.stderr == ("no data\n" if name == "a text" else "")
