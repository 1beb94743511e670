"""The command line that measures the all-reduce.

command line --> options.py --> run.py --> timed_loop.py --> table.py
                                  |             |
                              messages,    one timed call,
                              in turns     and its check
"""
