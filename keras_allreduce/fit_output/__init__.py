"""The fit output: plan, cost, hints, timelines and statistics.

In: the plan of a step and the times of its packs. Out: the plan line, the
progress bar, hints, the logs of `AllReduceLogger`, TensorBoard's scalars,
timelines and `ReduceStats`.

    step --> clocks.py --> stats.py --> step_log.py --+--> progress_bar.py
             (times)       (costs)      (epochs)      +--> callbacks.py
                                                      +--> hints.py
    step_log.py --> timeline.py --> recording.py --> chrome_trace.py
                    (steps)         (of a worker)

    model --> gradients.py --> a plan of `reduce` --> explain.py

`progress_bar.py` makes the one change to the output of Keras.
"""
