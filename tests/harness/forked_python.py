"""What others start in place of `python`: it has the process forked.

Not a test. In front of the arguments of `python` stands the socket of
`warm_server.py`. The environment, where `mpirun` has put rank and size, and
the outputs go to the forked process; signals do too, and its end is the end of
this one. Imports next to nothing, as it is there to save time.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGCONT)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    request = {
        "argv": sys.argv[2:],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "stdout": f"/proc/{os.getpid()}/fd/1",
        "stderr": f"/proc/{os.getpid()}/fd/2",
        "namespace": f"/proc/{os.getpid()}/ns/net",
        "executable": None,
    }
    server.sendall(json.dumps(request).encode() + b"\n")
    lines = server.makefile()
    pid = int(lines.readline())
    if "FORKED_PID_FILE" in os.environ:
        path = os.environ["FORKED_PID_FILE"]
        with open(f"{path}.new", "w") as file:
            file.write(str(pid))
        os.rename(f"{path}.new", path)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = int(lines.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
