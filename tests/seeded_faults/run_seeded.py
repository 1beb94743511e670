"""Checks that the tests see every seeded fault: `make test-seeded`.

    python tests/seeded_faults/run_seeded.py [--fast] [--check] [NAME ...]

Puts one fault of `faults.py` after the other into a copy of the checkout, runs
the tests named with it there, and puts it back. Fails if they pass, if the text
of a fault is not there exactly once, or if tests fail without a fault.
TensorFlow is imported once; every run of pytest is a fork of that process.
"""

import argparse
import contextlib
import gc
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback

from faults import FAULTS

CHECKOUT = pathlib.Path(__file__).parents[2]

IGNORED = shutil.ignore_patterns(
    ".*", "build", "*.egg-info", "__pycache__", "site", "docs"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of faults; default: all")
    parser.add_argument(
        "--fast", action="store_true", help="run only tests of `test-fast`"
    )
    parser.add_argument(
        "--check", action="store_true", help="only look for the texts"
    )
    parser.add_argument(
        "--no-baseline",
        action="store_true",
        help="do not run the tests without a fault first",
    )
    args = parser.parse_args()
    chosen = [f for f in FAULTS if not args.names or f.name in args.names]
    unknown = set(args.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    problems = [problem for fault in chosen for problem in moved(fault)]
    for problem in problems:
        print(problem, flush=True)
    if not args.check:
        there = [fault for fault in chosen if not list(moved(fault))]
        # A TemporaryDirectory would also go with the first fork that ends.
        folder = tempfile.mkdtemp()
        try:
            copy = pathlib.Path(folder, "checkout")
            shutil.copytree(CHECKOUT, copy, ignore=IGNORED)
            prepare(copy)
            problems += seed_all(there, copy, args)
        finally:
            shutil.rmtree(folder)
    print(f"{len(chosen)} faults, {len(problems)} problems")
    return int(bool(problems))


def moved(fault):
    """What is wrong with where a fault is, and with its tests."""
    path = CHECKOUT / "keras_allreduce" / fault.file
    count = path.read_text().count(fault.old) if path.exists() else None
    if count is None:
        yield f"MOVED   {fault.name}: there is no keras_allreduce/{fault.file}"
    elif count != 1:
        yield (
            f"MOVED   {fault.name}: its text is {count} times in "
            f"keras_allreduce/{fault.file}: {fault.old!r}"
        )
    for tests in fault.tests:
        for name in file_names(tests):
            if len(list(CHECKOUT.glob(f"tests/**/{name}"))) != 1:
                yield f"MOVED   {fault.name}: there is no one test {name}"


def file_names(tests):
    return [word for word in shlex.split(tests) if word.endswith(".py")]


def prepare(copy):
    """Imports what takes long, and nothing of the package."""
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["KERAS_ALLREDUCE_HINT"] = "0"
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    gc.set_threshold(20_000, 10, 10)
    import h5py  # noqa: F401
    import keras  # noqa: F401
    import tensorflow  # noqa: F401

    assert "keras_allreduce" not in sys.modules
    gc.freeze()


def seed_all(faults, copy, args):
    """Yields what is wrong, one line for each fault that no test sees."""
    passes = {}
    for fault in faults:
        path = copy / "keras_allreduce" / fault.file
        right = path.read_text()
        said = []
        for tests in fault.tests:
            if not args.no_baseline and tests not in passes:
                passes[tests] = run(tests, copy, args.fast, 1200)
            if passes.get(tests, ("passed",))[0] not in ("passed", "none"):
                said.append(f"without a fault: {passes[tests]}")
                continue
            path.write_text(right.replace(fault.old, fault.new))
            try:
                found = run(tests, copy, args.fast, fault.limit_seconds)
            finally:
                path.write_text(right)
            said.append(found)
            if found[0] in ("failed", "hangs"):
                print(f"seen    {fault.name} by {tests}: {found}", flush=True)
                break
        else:
            problem = f"UNSEEN  {fault.name} ({fault.what}): {said}"
            print(problem, flush=True)
            yield problem


def run(tests, copy, only_fast, limit_seconds):
    """How a run of pytest ends: a word, the first failure and the seconds."""
    words = shlex.split(tests)
    files = {name: copy.glob(f"tests/**/{name}") for name in file_names(tests)}
    words = [
        str(next(files[word])) if word in files else word for word in words
    ]
    marks = "not slow and not nightly" if only_fast else "not nightly"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", marks, "--tb=line"]
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as output:
        process = os.fork()
        if process == 0:
            _run_pytest([*options, *words], output.name)
        code = _exit_code(process, limit_seconds)
        lines = output.read().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    ends = {0: "passed", 1: "failed", 2: "failed", 5: "none", None: "hangs"}
    last = failed or lines[-1:]
    seconds = round(time.monotonic() - began)
    return (
        ends.get(code, f"exit code {code}"),
        last[0][:160] if last else "",
        seconds,
    )


def _run_pytest(arguments, output):
    """The body of a fork; it never returns."""
    code = 99
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        import pytest

        code = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
        import atexit

        # Ends the processes that tests keep, which os._exit does not.
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()  # The last line is shown.
    finally:
        os._exit(code)


def _exit_code(process, limit_seconds):
    """The exit code of a fork; `None` if it had to be killed."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


if __name__ == "__main__":
    sys.exit(main())
