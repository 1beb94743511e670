"""What `mpirun` starts in place of `python`: it has the process forked.

Not a test. In front of the arguments of `python` stands the socket of
`warm_server.py`. Rank and size, which `mpirun` has put into the environment,
go to the forked process; signals do too, and its end is the end of this one.
Imports next to nothing, as it is there to save time.
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
        "stdout": "output",
        "stderr": "output",
    }
    server.sendall(json.dumps(request).encode() + b"\n")
    lines = server.makefile()
    pid = int(lines.readline())
    with open("pid.new", "w") as file:
        file.write(str(pid))
    os.rename("pid.new", "pid")
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = int(lines.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
