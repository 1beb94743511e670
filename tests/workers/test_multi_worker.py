"""W workers train as one device does, and end in an error if one is lost.

The workers are processes of their own on loopback (`workers.py`). All programs
of the table that are marked for workers run in one pair of them, since
TensorFlow takes its time to start; `-k` runs there only those that it
selects.
"""

import json

import numpy as np
import programs
import pytest
import workers
from deadlines import seconds_for
from test_worker_failures import EITHER

pytestmark = pytest.mark.slow


def of_cases(run, function, request):
    """What `run` returns for the cases that are selected."""
    names = workers.selected(request)
    return run(function, names, deadline_seconds=seconds_for(names))


@pytest.fixture(scope="module")
def on_workers(request):
    """Results of each of two workers, by case."""
    return of_cases(workers.results, "cases", request)


@pytest.fixture(scope="module")
def on_workers_of_two_devices(request):
    return of_cases(workers.results, "cases_on_two_devices_each", request)


def cells_on(place):
    """Names of the programs that run on workers at a place, with marks."""
    return [
        pytest.param(name, marks=pytest.mark.nightly)
        if place in programs.PROGRAMS[name].nightly
        else name
        for name in programs.programs_on(place)
    ]


def found_by_all(name, results):
    """What a program has come to on every worker."""
    found = [result[name] for result in results]
    for each in found:
        assert "error" not in each, each["error"]
    return found


def agree(name, results):
    """Asserts that the workers agree, to the bit, and with one device."""
    programs.agree_on_workers(name, found_by_all(name, results))


@pytest.mark.parametrize("name", cells_on("workers"))
def test_workers_train_as_one_device_does(name, on_workers):
    agree(name, on_workers)


@pytest.mark.parametrize("name", cells_on("devices"))
def test_workers_of_two_devices_train_as_one_does(
    name, on_workers_of_two_devices
):
    agree(name, on_workers_of_two_devices)


def check_what_backprop_waits_for(results):
    """Asserts that products and collectives of a step are independent."""
    for found in results:
        # Two layers: two products forwards, three back. The collectives are
        # the number of samples, the logs and one pack.
        assert found["dense"] == [5, 0, 3]
        # Here they do: layers sum over workers as they go.
        assert found["synchronized"][1] > 1


def test_backprop_does_not_wait_for_the_other_workers():
    check_what_backprop_waits_for(workers.results("what_backprop_waits_for"))


def test_workers_sum_nothing_between_steps_but_all_metrics_at_once():
    for found in workers.results("sums_between_steps"):
        # Traced with the step: the number of samples. No step asks whether
        # anyone has data left.
        assert "reduce" not in found["first"]
        assert "batch" in found["first"]
        # Two epochs of a step that is traced: the metrics, once for each.
        assert found["then"] == [
            "steps are known",
            "metrics float32",
            "metrics float32",
        ]


ON_A_NARROW_WIRE = ["even_batches", "embedding", "eagerly"]


@pytest.fixture(
    scope="module",
    params=["bfloat16", pytest.param("float16", marks=pytest.mark.nightly)],
)
def on_a_narrow_wire(request):
    return workers.results(
        "cases_on_the_wire",
        ON_A_NARROW_WIRE,
        request.param,
    )


@pytest.mark.parametrize("name", ON_A_NARROW_WIRE)
def test_a_narrow_wire_trains_nearly_as_one_device(name, on_a_narrow_wire):
    first, other = found_by_all(name, on_a_narrow_wire)
    assert other == first
    expected, _ = programs.on_one_device(name)
    for got, wanted in zip(first["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-3)
    # Something did cross in fewer bits.
    assert first["weights"] != expected["weights"]


def agree_on_statistics(name, results):
    """Batches of 32 and 1: each worker counts as many times as its samples."""
    first, other = found_by_all(name, results)
    assert other == first
    expected, _ = programs.on_one_device(name)
    np.testing.assert_allclose(
        first["moving_mean"], expected["moving_mean"], rtol=1e-5
    )
    # The variance is one within the part of each, as it is on replicas.
    np.testing.assert_allclose(
        first["moving_variance"], expected["moving_variance"], rtol=0.2
    )


@pytest.mark.parametrize("name", ["batch_normalization"])
def test_workers_have_the_same_moving_statistics(name, on_workers):
    agree_on_statistics(name, on_workers)


@pytest.mark.parametrize("name", ["batch_normalization"])
def test_workers_of_two_devices_have_the_same_moving_statistics(
    name, on_workers_of_two_devices
):
    agree_on_statistics(name, on_workers_of_two_devices)


@pytest.mark.parametrize("name", ["dropout"])
def test_dropout_masks_differ_between_workers(name, on_workers):
    first, _ = results = [result[name] for result in on_workers]
    assert "error" not in first, first["error"]
    one, other = [result["masks"] for result in results]
    assert len(one) == len(other) == 4
    assert all(a != b for a, b in zip(one, other, strict=True))


TAG = "[keras_allreduce:WorkerLostError]"
STAY = "All workers must stay until training ends. Received:"


def test_all_workers_are_told_whom_they_wait_for():
    first, other = workers.results("fit_with_a_late_worker")
    assert first == other
    assert first["last_worker"] == [1, 1]
    # It computes for 300 ms before each step.
    assert all(late > 0 for late in first["lateness_ms"])


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What two workers say of what they send, and the chief's timeline."""
    path = tmp_path_factory.mktemp("timeline") / "timeline.json"
    results = workers.results("show_what_is_sent", str(path))
    return results, json.loads(path.read_text())


def test_the_plan_between_workers_is_the_one_of_the_step(shown):
    (chief, other), _ = shown
    assert chief == other
    assert chief["same"]
    assert all(chief["same"])


def test_explain_says_what_each_worker_sends(shown):
    (chief, _), _ = shown
    assert sum(chief["sent"]) > 0
    explained = " ".join(chief["explained"].split())
    assert "Each sends" in explained
    assert "over 2 replicas; between 2 workers" in explained
    assert "as bfloat16" in explained


def test_the_timeline_of_the_chief_has_all_workers_on_one_clock(shown):
    _, timeline = shown
    slices = [event for event in timeline["traceEvents"] if "dur" in event]
    for worker in (0, 1):
        steps = [
            event["name"]
            for event in slices
            if event["pid"] == worker and event["tid"] == 0
        ]
        assert steps == ["step 2", "step 3", "step 4"]
    chief, other = timeline["otherData"]["clock_error_ms"]
    assert chief == 0
    assert 0 < other < 200


def test_the_timeline_names_the_worker_that_is_waited_for(shown):
    _, timeline = shown
    waits = [
        (event["pid"], event["name"], event["tid"] >= 1000)
        for event in timeline["traceEvents"]
        if event["name"].startswith("wait for worker")
    ]
    # It comes 0.2 s late to each step: to all its packs, and as a replica.
    assert waits.count((0, "wait for worker 1", False)) == 3
    assert waits.count((0, "wait for worker 1", True)) >= 3


@pytest.mark.parametrize("index", [0, 1], ids=["chief", "other"])
def test_a_killed_worker_ends_the_other_in_an_error(index):
    code, output = workers.end_of_the_other("SIGKILL", index)
    assert code not in (0, None), output
    assert f"keras_allreduce: {STAY} worker {index} (127.0.0.1:" in output
    assert "its port is closed" in output.splitlines()[-1]


@EITHER
def test_a_frozen_worker_ends_the_other_in_an_error(index):
    code, output = workers.end_of_the_other("SIGSTOP", index)
    assert code not in (0, None), output
    why = f"{TAG} {STAY} worker {index} (127.0.0.1:"
    assert f"aborted by: {why}" in output
    assert "it is frozen" in output.splitlines()[-1]


def test_a_worker_that_falls_behind_ends_the_other_after_the_timeout():
    with workers.running("fit_and_fall_behind", 5) as pair:
        code = pair[0].wait()
        assert code not in (0, None), pair[0].output
        last = pair[0].output.splitlines()[-1]
        assert last.startswith("keras_allreduce: All workers must"), last
        assert "Received: all workers answer; worker 1 (127.0.0.1:" in last
        assert ") is at work (fit, epoch 1 of 1)" in last


def test_datasets_of_other_known_lengths_end_in_an_error_at_once():
    # Long before the timeout, which is 600 s.
    with workers.running("fit_with_other_lengths", None) as pair:
        for worker in pair:
            assert worker.wait() == 1, worker.output
            last = worker.output.splitlines()[-1]
            assert "steps in an epoch: worker 0" in last
            assert "has 4, worker 1" in last
            assert "`dataset.repeat()` with `steps_per_epoch`" in last


def test_datasets_of_other_lengths_train_as_many_steps_as_are_asked_for():
    chief, other = workers.results("fit_with_other_lengths", 2)
    assert chief == other
