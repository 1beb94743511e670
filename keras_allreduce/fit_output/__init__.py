"""What the user sees of the all-reduce.

In: the plan of a step and the times of its packs. Out: the plan line, the
progress bar, `AllReduceLogger`'s logs and `ReduceStats`.

    step --> clocks.py --> stats.py --> meter.py --+--> progress_bar.py
             (times)       (costs)      (epochs)   +--> logger.py

`keras_hook.py` is the one change that the package makes to Keras.
"""
