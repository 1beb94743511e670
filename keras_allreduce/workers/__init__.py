"""Everything between the processes of one training job.

In: TF_CONFIG and the packs of this worker. Out: sums over all workers, or one
error that names the worker that failed.

    start     cluster.py --> rendezvous.py --> connect.py --> agreement.py
    step      between_workers.py --> wire.py --> collectives.py
    failure   in_flight.py --> watchdog.py
"""
