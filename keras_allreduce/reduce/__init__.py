"""Gradients of replicas in, their sums out.

    gradients[variable][replica]
        |   buckets.py, pack_sizes.py   which gradients travel together
        v   packing.py
    packs[pack][replica]
        |   transport.py                in this process, or between workers
        |   algorithms.py               ring.py, shared_memory.py, nccl.py
        v   sparse.py                   rows are gathered instead
    sums[pack][replica]
        |   packing.py
        v
    sums of gradients, equal on all replicas

`batch_all_reduce.py` tells the whole story, `batch.py` the part about the
sums; `plan.py` and `observe.py` report the packs.
"""
