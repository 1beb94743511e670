"""MPI as the engine between hosts, with the interface of `collectives.py`.

In: tensors of this worker and a communicator. Out: sums and gathered rows of
all workers.

    TensorFlow's threads                       the thread that runs them
    collectives.py   run, returns in a moment --> engine.py   begins, tests
                     dequeue, holds no thread <-- and delivers
                                                  messages.py what crosses

`library.py` finds MPI and ends it. TensorFlow's runtime stays the control
plane: variables, agreement, health checks and failures.
"""
