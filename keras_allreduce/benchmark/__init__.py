"""The command line that measures the all-reduce.

command line --> options.py --> run.py --> timed_loop.py --> table.py
                                  |
                               model.py  (the gradients of a model)
"""
