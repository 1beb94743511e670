"""How long the tests wait for other processes, in seconds: here alone.

A deadline ends what hangs; no test asserts how fast something is. They hold on
a machine that is ten times slower, because it is busy or old.
"""

DEADLINE_SECONDS = 600
