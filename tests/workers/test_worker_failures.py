"""What goes wrong between workers ends in one error that says who and what.

The workers are processes of their own on loopback (`workers.py`).
"""

import signal

import pytest
import workers

pytestmark = pytest.mark.slow

SAME = "All workers must have the same"

# One pair of each kind runs with every push, the other one on a schedule.
EITHER = pytest.mark.parametrize(
    "index",
    [
        pytest.param(0, id="chief", marks=pytest.mark.nightly),
        pytest.param(1, id="other"),
    ],
)


def ends(function, *arguments, num_workers=2):
    """Outputs of workers that all have to end; a hang fails the test."""
    with workers.running(
        function, *arguments, num_workers=num_workers
    ) as all_workers:
        codes = [worker.wait() for worker in all_workers]
        outputs = [worker.output for worker in all_workers]
        assert None not in codes, "\n".join(outputs)
        return codes, outputs


DIFFERENCES = {
    "shape": ("models and steps", "float32 [8, 5]", "float32 [8, 7]"),
    "option": ("versions, devices and options", "1024", "512"),
    "devices": ("versions, devices and options", "1", "2"),
}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=[] if what == "shape" else pytest.mark.nightly)
        for what in DIFFERENCES
    ],
)
def test_workers_that_differ_all_say_in_what(what):
    codes, outputs = ends("fit_what_differs", what)
    name, of_chief, of_other = DIFFERENCES[what]
    assert codes == [1, 1]
    for output in outputs:
        last = output.strip().splitlines()[-1]
        assert f"WorkersDifferError: {SAME} {name}" in last, output
        assert f") has {of_chief}" in last
        assert f") has {of_other}" in last


def test_a_worker_without_memory_ends_the_other_in_an_error():
    codes, (chief, other) = ends("fit_and_run_out_of_memory", 1)
    assert codes == [1, 1]
    assert "OOM when allocating tensor" in other
    last = chief.strip().splitlines()[-1]
    assert "Received: worker 1 (127.0.0.1:" in last, chief


@EITHER
def test_a_worker_that_never_comes_is_named(index):
    codes, outputs = ends("start_without", index, 3, num_workers=2)
    assert codes[1 - index] == 1
    assert f"Never reached: worker {index} (127.0.0.1:" in outputs[1 - index]


@EITHER
def test_a_port_in_use_is_named(index):
    codes, outputs = ends("start_with_a_port_in_use", index, 5)
    assert codes == [1, 1]
    rule = "The port of a worker must be free. Received: worker"
    assert f"{rule} {index} (127.0.0.1:" in outputs[index]
    assert f"worker {index} (127.0.0.1:" in outputs[1 - index]


def test_workers_with_other_addresses_say_so():
    codes, outputs = ends("start_with_other_addresses")
    assert codes == [1, 1]
    for output in outputs:
        assert "All workers must have the same cluster" in output


@EITHER
def test_a_worker_may_work_on_alone_after_the_others_ended(index):
    codes, outputs = ends("end_one_after_the_other", index)
    assert codes == [0, 0], outputs
    assert "keras_allreduce" not in outputs[index]
    assert "All workers" not in outputs[index]


@EITHER
def test_a_worker_that_dies_while_they_connect_ends_the_other(index):
    codes, outputs = ends("die_after_the_meeting", index, 8)
    assert codes[1 - index] not in (0, None)
    rule = "All workers must stay while they connect. Received: "
    last = outputs[1 - index].strip().splitlines()[-1]
    assert rule in last, outputs[1 - index]


@EITHER
def test_sigterm_ends_a_worker_and_the_other_says_so(index):
    codes, outputs = ends("fit_and_signal", "SIGTERM", index, 60)
    assert codes[index] == -signal.SIGTERM
    assert codes[1 - index] == 1
    last = outputs[1 - index].strip().splitlines()[-1]
    assert f"Received: worker {index} (127.0.0.1:" in last, outputs[1 - index]


@EITHER
def test_the_error_of_a_script_is_told_by_the_other(index):
    codes, outputs = ends("fit_and_raise", index)
    assert codes == [1, 1]
    assert outputs[index].strip().endswith("KeyError: 'of the script'")
    last = outputs[1 - index].strip().splitlines()[-1]
    assert f"Received: worker {index} (127.0.0.1:" in last, outputs[1 - index]
    assert "has failed: KeyError: 'of the script'. Look at its log" in last


@EITHER
def test_a_code_of_sys_exit_is_a_failure_that_the_other_tells(index):
    codes, outputs = ends("fit_and_exit", index)
    assert codes[index] == 3
    assert codes[1 - index] == 1
    last = outputs[1 - index].strip().splitlines()[-1]
    assert f"Received: worker {index} (127.0.0.1:" in last, outputs[1 - index]
    assert "has failed: SystemExit: 3. Look at its log" in last


def test_a_connection_that_breaks_ends_both_in_one_sentence():
    codes, outputs = ends("fit_and_disconnect", 1)
    assert codes == [1, 1]
    for output in outputs:
        last = output.strip().splitlines()[-1]
        assert "All workers must stay connected until training ends." in last
        assert "UnavailableError: " in last


def test_a_sigterm_while_tensorflow_connects_ends_the_worker():
    codes, _ = ends("fit_with_a_sigterm_while_connecting", 1)
    assert codes == [1, -signal.SIGTERM]


def test_handlers_of_sigterm_are_the_scripts():
    results = workers.results("hear_sigterm")
    assert results == 2 * [
        {
            "heard": ["before", "after"],
            "exit_code_of_child": -signal.SIGTERM,
        }
    ]


def test_a_preemption_handler_of_the_script_saves_on_all_workers():
    chief, other = workers.results("checkpoint_on_sigterm")
    assert chief["saved"] == chief["steps"] == other["steps"] >= 5


def test_a_worker_with_a_pool_of_processes_ends_with_its_script():
    results = workers.results("fit_with_processes")
    assert results == [True, True]


def test_workers_train_without_the_coordination_service_and_say_so_once():
    with workers.running("fit_without_coordination") as both:
        assert [worker.wait() for worker in both] == [0, 0], both[0].output
        one, another = (worker.result for worker in both)
        outputs = [worker.output for worker in both]
    assert one == another
    assert one["replicas"] == 2
    losses = one["losses"]
    assert all(last < first for first, last in losses)
    for output in outputs:
        assert output.count("coordination service is switched off") == 1


def test_a_variable_after_a_failure_is_an_unavailable_error():
    with workers.running("make_a_variable_after_a_failure") as (chief, _):
        chief.wait()
        compared, sent = chief.result
    for _, message in (compared, sent):
        assert "worker 1 (127.0.0.1:" in message
    assert compared[0]
