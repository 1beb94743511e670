"""Distributed data sets: how they are iterated, and how iterators end.

In: a data set that TensorFlow has distributed. Out: the same data set, whose
iterators are made when first read, in milliseconds, and freed by a thread of
their own. Elements, their order and their parts stay TensorFlow's.

    dataset.py         iter(dataset), in the order of the calls
    |-- in_turn.py     host devices: one iterator, read in turn
    |-- to_devices.py  GPUs: prefetched to each, functions traced once
    `-- release.py     frees iterators off the path of training

    shuffled_arrays.py arrays of Keras in one order on all workers
"""
