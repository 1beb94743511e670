"""Gradients of replicas in, their sums out.

    gradients[variable][replica]
        |   buckets.py, pack_sizes.py   which gradients travel together
        v   packing.py
    packs[pack][replica]
        |   ring.py, shared_memory.py, nccl.py, sparse.py
        v
    sums[pack][replica]
        |   packing.py
        v
    sums of gradients, equal on all replicas

`batch_all_reduce.py` tells the whole story; `plan.py` and `observe.py` report
what is sent.
"""
