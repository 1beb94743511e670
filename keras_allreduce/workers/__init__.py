"""Everything between the processes of one training job.

In: TF_CONFIG and the packs of this worker. Out: sums over all workers, or an
error that names the failed worker.

    start     cluster.py --> reports.py --> connect.py
    group     group.py: all of the below, of one strategy
    check     consistency_check.py --> store.py
              calls.py --> data_fingerprint.py, weight_fingerprint.py
              model_fingerprint.py --> described.py
    step      between_workers.py --> wire.py --> collectives.py
              wire_formats.py: how a tensor crosses
    failure   heartbeats.py --> health.py --> excepthook.py
    stall     in_flight.py --> progress.py --> stall.py --> health.py
    straggler in_flight.py
"""
