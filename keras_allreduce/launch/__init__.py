"""The command line that starts the workers of a job. No TensorFlow.

command line --> options.py --> job.py --> worker.py (one per worker)
                                  |            |
                                guard.py    output.py
                       nothing outlives it   the screen
"""
