"""Programs train on workers that are threads of one process as on one device.

Real `Workers` under real steps, in seconds; `thread_workers.py` says what is
not there. Processes are tested in `workers/test_multi_worker.py`.
"""

import pytest
import thread_workers
from five_devices import DEVICES

import programs

# Names of devices, by worker.
TWO_OF_ONE = [DEVICES[:1], DEVICES[1:2]]
TWO_OF_TWO = [DEVICES[:2], DEVICES[2:4]]
THREE_OF_ONE = [DEVICES[:1], DEVICES[1:2], DEVICES[2:3]]

ON_MORE = {
    "uneven_batches": THREE_OF_ONE,
    "last_batch_of_one_sample": TWO_OF_TWO,
}


@pytest.mark.parametrize("name", programs.programs_on("threads"))
def test_workers_train_as_one_device_does(name):
    devices = ON_MORE.get(name, TWO_OF_ONE)
    results = thread_workers.results(name, devices)
    programs.agree_on_workers(name, results)
