"""CPU time of each test file, with that of the processes it starts.

    pytest --cpu-times

A wall time depends on what else the machine does, a CPU time much less. The
time of a fixture counts for the first test that needs it.
"""

import collections
import os
from pathlib import Path

import pytest

NAME = "cpu_seconds"
SHOWN = 40


def of_this_process():
    """CPU seconds of this process and of all that it has started so far."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may have spaces and brackets.
            words = path.read_text().rpartition(")")[2].split()
        except OSError:  # It has just ended.
            continue
        pid = int(path.parent.name)
        parents.setdefault(int(words[1]), []).append(pid)
        # Its own, and of its children that have ended.
        seconds[pid] = sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    total, pending = 0.0, [os.getpid()]
    while pending:
        pid = pending.pop()
        total += seconds.get(pid, 0.0)
        pending += parents.get(pid, [])
    return total


class CpuTimes:
    """A plugin of pytest; pytest-xdist hands on what each process notes."""

    def __init__(self):
        self._before = 0.0
        self._found = collections.Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        if report.when == "teardown":
            now = of_this_process()
            report.user_properties.append((NAME, now - self._before))
            self._before = now
        return report

    def pytest_runtest_logreport(self, report):
        for name, seconds in report.user_properties:
            if name == NAME and report.when == "teardown":
                self._found[report.nodeid.split("::")[0]] += seconds

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        terminalreporter.section("CPU time")
        for file, seconds in self._found.most_common(SHOWN):
            write(f"{seconds:7.1f} s  {file}")
        write(f"{sum(self._found.values()):7.1f} s  all")
