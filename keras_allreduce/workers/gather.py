"""Gathers a message of every process at rank 0, which answers all at once.

    rank 1                     rank 0                      rank 2
       |--- message ------------->|                           |
       |                          |<------------- message ----|
       |<-- answer ---------------|-------------- answer ---->|

`reports.py` has the messages.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_allreduce.addresses import Address
from keras_allreduce.workers.reports import (
    GatherServer,
    NoAnswer,
    Report,
    deliver,
)
from keras_allreduce.workers.timing import TIMING

Verdict = Callable[[Mapping[str, Any]], int | str | None]
"""Rank of a message, the problem with it, or `None`: it is ignored."""


@dataclass(frozen=True)
class Gathering:
    """Facts that all processes of one job agree on before they talk.

    Attributes:
        size: Number of processes.
        timeout_seconds: How long to wait for the others.
        token: Job token, the same on all.
        limit_bytes: Largest message and answer.
        check: Judges a message at rank 0.
        never_came: Describes the ranks that were never reached, and what was
            there instead.
        came_twice: Describes a rank that two processes have.
    """

    size: int
    timeout_seconds: float
    token: str
    limit_bytes: int
    check: Verdict
    never_came: Callable[[list[int], str], str]
    came_twice: Callable[[int], str]

    def collect(
        self,
        server: socket.socket,
        answer: Callable[[Mapping[int, Report]], Mapping[str, Any]] = (
            lambda reports: {}
        ),
    ) -> str | None:
        """Gathers at rank 0. Returns the problem, if any, which all are told.

        Args:
            server: Listens; is closed.
            answer: Makes the answer from the reports of the others, by rank.
        """
        end = time.monotonic() + self.timeout_seconds
        here: dict[int, Report] = {}
        with GatherServer(server, self.token, self.limit_bytes) as reception:
            problem = None
            while problem is None and len(here) < self.size - 1:
                for report in reception.wait(TIMING.retry):
                    problem = self._admit(report, here) or problem
                here = {r: c for r, c in here.items() if not c.has_ended}
                missing = [r for r in range(1, self.size) if r not in here]
                if problem is None and missing and time.monotonic() > end:
                    problem = self.never_came(missing, reception.turned_away)
            for report in here.values():
                report.answer({"problem": problem, **answer(here)})
        return problem

    def _admit(self, report: Report, here: dict[int, Report]) -> str | None:
        verdict = self.check(report.content)
        if isinstance(verdict, int):
            if verdict not in here or here[verdict].has_ended:
                here[verdict] = report
                return None
            verdict = self.came_twice(verdict)
        if verdict is not None:
            # The others are told when the gathering ends.
            report.answer({"problem": verdict})
        return verdict

    def report(
        self, leader: Sequence[Address], message: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Reports to rank 0 and returns its answer, with the problem if any."""
        try:
            answer = deliver(
                leader,
                message,
                self.token,
                self.timeout_seconds,
                TIMING.late_chief,
                self.limit_bytes,
            )
        except NoAnswer as reason:
            return {"problem": self.never_came([0], str(reason))}
        problem = answer.get("problem")
        return {**answer, "problem": problem and str(problem)}


def listen(port: int, backlog: int = 128) -> socket.socket:
    """A socket that listens where TensorFlow's server on this port will.

    Raises:
        OSError: If the port is not free.
    """
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if dual else socket.AF_INET,
        dualstack_ipv6=dual,
        backlog=backlog,
    )


def first_free(ports: Sequence[int], backlog: int) -> socket.socket | None:
    """A socket that listens on the first port that is free, if one is."""
    for port in ports:
        with contextlib.suppress(OSError):
            return listen(port, max(128, backlog))
    return None
