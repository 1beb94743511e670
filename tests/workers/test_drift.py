"""What one worker does alone is shared, or ends in an error on all of them."""

import re

import numpy as np
import pytest
import tensorflow as tf
import workers
from test_worker_failures import EITHER

pytestmark = pytest.mark.slow

ERRORS = {
    "learning_rate_on_one": (
        "weights and optimizer",
        "'sgd/learning_rate': worker 0 (",
        "has 0.05, worker 1 (",
        "has 0.01",
        "strategy.broadcast(model)",
    ),
    "weights_in_the_last_step": (
        "weights and optimizer",
        "/bias': worker 0 (",
        "has [1]",
    ),
    "statistics_of_a_custom_loop": (
        "weights and optimizer",
        "/moving_mean': worker 0 (",
        "After a custom training loop",
        "`BatchNormalization(synchronized=True)`",
    ),
    "arrays_of_its_own": ("calls of Keras and data", "arrays: worker 0 ("),
    "other_number_of_samples": (
        "calls of Keras and data",
        "number of samples: worker 0 (",
        "has 62, worker 1 (",
        "has 63",
    ),
    "evaluate_on_the_chief": (
        "calls of Keras and data",
        "has evaluate (its data), worker 1 (",
        "has fit (its data)",
    ),
    "validation_on_the_chief": (
        "calls of Keras and data",
        "has fit, epoch 1 of 2 (its data), worker 1 (",
        "has fit, epoch 2 of 2",
    ),
    "early_stopping_on_the_chief": (
        "calls of Keras and data",
        "has predict (its data), worker 1 (",
        "has fit, epoch 3 of 5",
    ),
    "other_activation": (
        "models and compile options",
        "`activation` of layer 'first': worker 0 (",
        "has 'relu', worker 1 (",
        "has 'tanh'",
    ),
    "other_batch_size": (
        "calls of Keras and data",
        "batch size: worker 0 (",
        "has 22, worker 1 (",
    ),
    "other_batch_size_of_a_dataset": (
        "calls of Keras and data",
        "batch size: worker 0 (",
        "has [22], worker 1 (",
    ),
    "seed_of_its_own": (
        "calls of Keras and data",
        "seeds of shuffles: worker 0 (",
    ),
    "off_by_more_than_rounding": (
        "weights and optimizer",
        "/kernel': worker 0 (",
        "(checksum ",
        ", off by 9.8e-04",
    ),
}

SHARED = [
    "off_by_rounding",
    "shuffle_without_a_seed",
    "shuffle_of_a_py_dataset",
    "py_dataset_that_shuffles_itself",
    "py_dataset_of_an_order_of_its_own",
    "seeds_of_each_worker",
    "broadcast",
    "logs_of_steps",
    "logs_of_accumulating_steps",
    "terminate_on_nan",
    "train_on_batch",
    "train_on_own_parts",
    "numbers",
    "warnings_of_order",
    "warnings_of_shards",
    "warnings_of_generators",
    "what_may_differ",
    "explained_once",
    "store_operations",
    "decisions_on_validation",
    "decisions_on_validation_of_parts",
]


@pytest.fixture(scope="module")
def found(request):
    """What each worker has found, by case; all run in one pair."""
    return workers.results("drift_cases", [*ERRORS, *SHARED])


@pytest.mark.parametrize("name", ERRORS)
def test_a_difference_ends_in_an_error_on_both_that_names_it(name, found):
    chief, other = (each[name] for each in found)
    assert chief == other
    what, *parts = ERRORS[name]
    rule = f"WorkersDifferError: All workers must have the same {what}"
    assert chief["error"].startswith(rule), chief
    for part in parts:
        assert part in chief["error"]


def shared(found, name):
    chief, other = (each[name] for each in found)
    assert not (isinstance(chief, dict) and "error" in chief), chief
    assert chief == other
    return chief


def on_one_device(name):
    import drift_cases

    return drift_cases.run(name, tf.distribute.get_strategy())


def test_arrays_are_shuffled_alike_without_a_seed(found):
    used = shared(found, "shuffle_without_a_seed")
    # The last batch has 6 samples, and its loss is their mean.
    times = np.asarray(used["first"])
    assert np.isclose(times, 1).sum() == 40
    assert np.isclose(times, 8 / 6).sum() == 6
    assert used["orders differ"]


def test_a_py_dataset_is_shuffled_alike_without_a_seed(found):
    used = shared(found, "shuffle_of_a_py_dataset")
    # Each batch has one number, whose part each worker has trained on.
    np.testing.assert_allclose(used, 3.0)


def test_a_py_dataset_that_shuffles_itself_has_one_order(found):
    result = shared(found, "py_dataset_that_shuffles_itself")
    assert not any("All workers" in each for each in result["said"])
    np.testing.assert_allclose(result["used"], np.ones([3, 48]), atol=1e-5)


def test_a_py_dataset_of_another_order_is_warned_of_once(found):
    result = shared(found, "py_dataset_of_an_order_of_its_own")
    (said,) = (each for each in result["said"] if "All workers" in each)
    assert "a `PyDataset` whose first batch is not the same" in said
    assert "keras.utils.set_random_seed" in said


def test_numpy_that_the_script_seeds_stays_as_it_is(found):
    result = shared(found, "seeds_of_each_worker")
    assert not any("All workers" in each for each in result["said"])
    np.testing.assert_allclose(result["used"], np.ones([2, 48]), atol=1e-5)
    assert result["kept"]


def test_the_chiefs_weights_and_learning_rate_are_taken_where_asked_for(found):
    result = shared(found, "broadcast")
    assert np.isclose(result["rate"], 0.01)


@pytest.mark.parametrize(
    "name",
    [
        "logs_of_steps",
        "logs_of_accumulating_steps",
        "train_on_batch",
        "train_on_own_parts",
    ],
)
def test_logs_of_steps_are_those_of_one_device(name, found):
    np.testing.assert_allclose(
        shared(found, name), on_one_device(name), rtol=1e-5
    )


def test_a_loss_of_one_worker_that_is_not_a_number_stops_all(found):
    assert shared(found, "terminate_on_nan") == 2
    assert on_one_device("terminate_on_nan") == 2


def test_what_is_off_by_rounding_is_the_chiefs_again(found):
    weights = shared(found, "off_by_rounding")
    assert np.all(np.isfinite(weights[0]))


def test_variables_of_workers_are_numbers(found):
    rate, iterations = shared(found, "numbers")
    assert np.isclose(rate, 0.05)
    assert iterations == 6


def test_an_order_that_cannot_be_known_is_warned_of(found):
    warnings = shared(found, "warnings_of_order")
    assert sum("shuffles without a seed" in each for each in warnings) == 1


def test_a_shard_of_each_worker_is_warned_of_once(found):
    counts = [
        sum(
            "Remove `shard`, or set `AutoShardPolicy.OFF`" in each
            for each in said
        )
        for said in shared(found, "warnings_of_shards")
    ]
    assert counts == [1, 0]


def test_what_each_worker_has_of_its_own_ends_no_job(found):
    result = shared(found, "what_may_differ")
    assert not any("All workers" in each for each in result["said"])


def test_the_chief_alone_prints_what_a_step_will_send(found):
    printed = [each["explained_once"] for each in found]
    # A function that is passed is called where it is passed.
    assert printed == [[True, 1], [False, 1]]


def test_a_worker_asks_the_store_twice_in_an_epoch(found):
    asked = shared(found, "store_operations")
    # At most once to publish, and once to read.
    assert asked["in an epoch"] <= 2
    # The call, its first epoch and its end.
    assert asked["in a fit"] <= 6


def test_generators_that_begin_with_other_batches_are_warned_of(found):
    counts = [
        sum("first batch is not the same" in each for each in said)
        for said in shared(found, "warnings_of_generators")
    ]
    assert counts == [0, 1]


def test_callbacks_decide_on_validation_as_on_one_device(found):
    decided = shared(found, "decisions_on_validation")
    alone = on_one_device("decisions_on_validation")
    assert decided["seen"] == alone["seen"]
    for name, values in alone["history"].items():
        np.testing.assert_allclose(
            decided["history"][name], values, rtol=1e-4, err_msg=name
        )
    # Each of the three has decided.
    rates, files = zip(*decided["seen"], strict=True)
    assert len(set(rates)) > 1
    assert 0 < len(files[-1]) < len(files) < 12


def test_callbacks_decide_alike_on_validation_of_uneven_parts(found):
    decided = shared(found, "decisions_on_validation_of_parts")
    rates, files = zip(*decided["seen"], strict=True)
    assert len(set(rates)) > 1
    assert 0 < len(files[-1]) < len(files) < 12


@EITHER
def test_a_worker_that_stops_in_an_epoch_ends_both_at_once(index):
    # Long before the timeout, which is 600 s.
    with workers.running("fit_and_stop_alone", index) as pair:
        for worker in pair:
            assert worker.wait() == 1, worker.output
            last = worker.output.strip().splitlines()[-1]
            assert "All workers must take part in each step and sum" in last
            where = dict(
                re.findall(
                    r"worker (\d) \(\S+\) ([a-z ]+) \(fit, epoch 1 of 5\)",
                    last,
                )
            )
            # Each is seen while it waits; one also just before it waits.
            assert sorted(where) == ["0", "1"], last
            assert set(where.values()) != {"is at work"}, last
            stopped, goes_on = where[str(index)], where[str(1 - index)]
            assert stopped in ("is at work", "waits for a sum outside of steps")
            assert goes_on in ("is at work", "waits in a step")


@pytest.mark.parametrize(("index", "seconds"), [(0, 0), (1, 3)])
def test_a_call_after_the_other_script_has_ended_says_so(index, seconds):
    with workers.running("predict_alone", index, seconds) as pair:
        ended = pair[1 - index]
        assert ended.wait() == 0, ended.output
        assert pair[index].wait() == 1, pair[index].output
        last = pair[index].output.strip().splitlines()[-1]
        assert f"worker {1 - index} (127.0.0.1:" in last
        assert "has ended its script" in last
        assert "killed" not in last
