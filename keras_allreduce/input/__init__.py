"""Distributed data sets: how they are iterated, and how iterators end.

In: a dataset distributed by TensorFlow. Out: the same dataset with iterators
that are created lazily, in milliseconds, and freed in a background thread.
Elements, their order and their split over replicas are TensorFlow's.

    dataset.py         iter(dataset), in the order of the calls
    |                  logical CPU devices: one iterator, read in turn
    |                  GPUs: prefetched to each, functions traced once
    `-- release.py     frees iterators in the background
"""
