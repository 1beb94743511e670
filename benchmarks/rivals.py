"""Rivals in processes of their own that take turns.

TensorFlow cannot run two MirroredStrategies well in one process, and what one
strategy sets for the whole process (how memory is freed, threads) must not
help or hurt another. So every rival has a process that stays for the whole
run, and the benchmark asks one after the other for a turn: rounds are
interleaved, and ratios are taken within a round.

The process of a rival calls `serve`; the benchmark starts it as a `Rival`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def serve(turn: Callable[..., Any]) -> None:
    """Answers each request with `turn(**request)` until the input ends.

    Whatever else the process prints goes to its stderr.

    Args:
        turn: Takes what the benchmark passes to `Rival.ask`; what it returns
            must be JSON.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(turn(**json.loads(line))), file=answers, flush=True)


class Rival(contextlib.AbstractContextManager):
    """A process that waits for its next turn.

    Args:
        name: What it is called in an error.
        command: Its command line, which ends in a call of `serve`.
        log: File that gets its stderr.
        environment: Variables besides those of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ):
        self.name = name
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def ask(self, **request: Any) -> Any:
        """Gives it a turn, and returns what came of it.

        Raises:
            SystemExit: If the process ends instead, with what it said last.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise SystemExit(
                f"{self._log.read_text()[-3000:]}\n"
                f"{self.name} ended with exit code {code}."
            )
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
