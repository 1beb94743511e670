"""The communicator of each name, made in one order on all workers.

    a worker          rank 0                      a worker
    ask: name -->     counts; all have asked
                      go: name --> to all --> makes the communicator, begins

Nobody waits: who asks goes on with other collectives until it hears.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_allreduce.workers.mpi.messages import Collective

_ASK, _GO = 1, 2


@dataclass(eq=False)
class Submission:
    """One run of a collective.

    Attributes:
        name: Name of the collective, the same on all workers. Two runs of one
            name must not overlap.
        collective: One of `messages.py`.
        own: The array that this worker sends.
        deliver: Called once, from any thread: with what was received, or with
            `None` if the engine has failed.
    """

    name: str
    collective: Collective
    own: np.ndarray
    deliver: Callable[[np.ndarray | None], None]


class Communicators:
    """The communicators that all workers have, by name, and those asked for.

    Args:
        mpi: The module `mpi4py.MPI`.
        comm: Communicator of all workers.

    Attributes:
        comms: The communicator of each name that all workers have.
    """

    def __init__(self, mpi: Any, comm: Any):
        self._mpi = mpi
        self._comm = comm
        self._control = comm.Dup()
        self.comms: dict[str, Any] = {}
        self._asking: dict[str, Submission] = {}
        self._asked: dict[str, int] = {}

    @property
    def are_asked_for(self) -> bool:
        """Whether a collective waits until all workers have its name."""
        return bool(self._asking)

    def ask(self, call: Submission) -> list[Submission]:
        """Asks for a name; returns what may begin now."""
        self._asking[call.name] = call
        if self._comm.rank == 0:
            return self._count(call.name)
        self._control.Isend(bytearray(call.name.encode()), 0, _ASK).Wait()
        return []

    def agree(self) -> list[Submission]:
        """Hears the other workers; returns what may begin now."""
        ready: list[Submission] = []
        status = self._mpi.Status()
        while self._control.Iprobe(tag=self._mpi.ANY_TAG, status=status):
            text = bytearray(status.Get_count(self._mpi.BYTE))
            self._control.Recv(text, status.source, status.tag)
            if status.tag == _ASK:
                ready += self._count(text.decode())
            else:
                ready.append(self._go(text.decode()))
        return ready

    def _count(self, name: str) -> list[Submission]:
        """On rank 0: counts the workers that run a collective of this name."""
        self._asked[name] = self._asked.get(name, 0) + 1
        if self._asked[name] < self._comm.size:
            return []
        del self._asked[name]
        for rank in range(1, self._comm.size):
            self._control.Send(bytearray(name.encode()), rank, _GO)
        return [self._go(name)]

    def _go(self, name: str) -> Submission:
        # All are here, or about to be: each has asked.
        self.comms[name] = self._comm.Dup()
        return self._asking.pop(name)
