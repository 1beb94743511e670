"""N replicas train as one device does.

In: a step of Keras and a batch divided over replicas. Out: the weights, logs
and metrics that one device would have after the whole batch.

    batch --> parts of replicas --> loss x share of the batch --> gradients
                                                                      |
    logs as of one device <-- update <-- finite check, clip <-- sum over all

`step.py` tells the whole story: which object of the model is shadowed by what.
"""
