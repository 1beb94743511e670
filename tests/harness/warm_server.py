"""Starts Python processes by `fork`, so that TensorFlow is imported once.

Not a test. `warm_python.py` runs one server per process of pytest: importing
TensorFlow takes most of the time of a small process. A server has imported it
and started nothing: forked, that is as good as new.

Not the standard library's forkserver: a child of that one ends without
`sys.excepthook` and `atexit`, which are among what is tested, and nobody but
its own client, such as `mpirun`, can ask it for a process.

It listens on the Unix socket whose path is its argument, and ends when its
stdin does. A connection asks for one process:

    client    a line of JSON: `argv` as behind `python`, `environment`,
              `folder` to run in, paths of the files `stdout` and `stderr`,
              path of a network `namespace` or null, what the process takes
              for its `executable` or null
    server    a line: the process id
    server    a line: the exit code, at the end; minus the signal, if one
              killed it

A client that hangs up has its process killed: none outlives the tests.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types

import garbage


class Server:
    """Answers requests.

    Args:
        path: Path of the socket.
    """

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{path}.new")
        self._listener.listen(64)
        # Whoever sees the path can connect.
        os.rename(f"{path}.new", path)
        self._connections = {}  # By process id.
        self._ended = os.pipe()  # Has a byte for each child that ends.
        for end in self._ended:
            os.set_blocking(end, False)
        self._selector = selectors.DefaultSelector()
        for source, answer in (
            (self._listener, self._accept),
            (self._ended[0], self._note_ends),
            (sys.stdin, self._stop),
        ):
            self._selector.register(source, selectors.EVENT_READ, answer)

    def serve(self):
        """Returns in each child, with its request."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._ended[1], warn_on_full_buffer=False)
        while True:
            for key, _ in self._selector.select():
                request = key.data()
                if request is not None:
                    return request

    def _accept(self):
        connection, _ = self._listener.accept()
        request = json.loads(connection.makefile().readline())
        pid = os.fork()
        if pid == 0:
            self._leave(connection)
            return request
        self._connections[pid] = connection
        connection.sendall(f"{pid}\n".encode())
        self._selector.register(
            connection,
            selectors.EVENT_READ,
            lambda: self._end(pid),
        )
        return None

    def _leave(self, connection):
        """Lets a child go of all that is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        self._listener.close()
        for each in (connection, *self._connections.values()):
            each.close()
        for end in self._ended:
            os.close(end)

    def _stop(self):
        for pid in list(self._connections):
            self._end(pid)
        sys.exit()

    def _end(self, pid):
        """Ends a process whose client has hung up."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._connections[pid])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _note_ends(self):
        os.read(self._ended[0], 4096)
        for pid in list(self._connections):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            connection = self._connections.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(connection)
            with contextlib.suppress(OSError), connection:
                code = os.waitstatus_to_exitcode(status)
                connection.sendall(f"{code}\n".encode())


def become(request):
    """Makes this process look as if it were started by itself."""
    os.setpgid(0, 0)
    if request["namespace"]:
        _enter(request["namespace"])
    os.chdir(request["folder"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target, path in ((1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, flags, 0o600)
        os.dup2(file, target)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["executable"] or sys.executable


def _enter(namespace):
    if os.path.samefile(namespace, "/proc/self/ns/net"):
        return
    with open(namespace) as file:
        libc = ctypes.CDLL(None, use_errno=True)
        # As `os.setns` of Python 3.12.
        if libc.setns(file.fileno(), 0x4000_0000):
            raise OSError(ctypes.get_errno(), "setns", namespace)


def run(argv):
    """Runs what `python` runs with these arguments."""
    what, *rest = argv
    if what == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif what == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = ["-m", *rest], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [what, *rest], os.path.dirname(what)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    garbage.look_seldom()
    import keras  # noqa: F401
    import tensorflow  # noqa: F401

    import keras_allreduce
    from keras_allreduce.compat import runtime

    _ = keras_allreduce.MultiWorkerAllReduceStrategy
    assert not runtime.is_started(), "Threads do not survive a fork."
    # No child looks for garbage in what was imported here, least of all at its
    # end: that takes longer than a small process.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = Server(sys.argv[1]).serve()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    become(request)
    run(request["argv"])
