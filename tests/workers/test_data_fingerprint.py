"""What workers compare, and that an epoch is what Keras makes of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.compat import keras_calls
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.consistency_check import ConsistencyCheck
from keras_allreduce.workers.data_fingerprint import (
    are_other_samples,
    are_shards,
    of_batch,
    shards,
    steps_of_epochs,
)
from keras_allreduce.workers.errors import WorkersDifferError
from keras_allreduce.workers.fingerprint import Fingerprint
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.progress import Progress


class Count(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = []

    def on_epoch_begin(self, epoch, logs=None):
        self.steps.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.steps[-1] += 1


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("asked", "batches", "made", "said"),
    [
        (None, 3, [3, 3, 3, 3], "3"),
        (2, 4, [2, 2, 2, 2], "2"),
        (4, 2, [2, 2, 2, 2], "2"),
        (2, 5, [2, 2, 1, 2], "2, but 1 in epoch 3"),
        (2, None, [2, 2, 2, 2], "2"),
    ],
)
def test_the_steps_of_epochs_are_those_that_keras_makes(
    asked, batches, made, said
):
    data = tf.data.Dataset.from_tensor_slices(
        (np.zeros([batches or 1, 2]), np.zeros([batches or 1, 1]))
    ).batch(1)
    if batches is None:
        data = data.repeat()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    count = Count()
    model.fit(
        data, steps_per_epoch=asked, epochs=4, verbose=0, callbacks=[count]
    )
    assert count.steps == made
    assert steps_of_epochs(asked, batches) == said


def test_an_epoch_of_unknown_length_says_so():
    assert steps_of_epochs(None, None) == "not known"


def with_policy(dataset, policy):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    return dataset.with_options(options)


POLICIES = tf.data.experimental.AutoShardPolicy


@pytest.mark.parametrize("policy", [POLICIES.AUTO, POLICIES.DATA])
def test_shards_are_seen_wherever_they_are(policy):
    data = tf.data.Dataset.range(8).shard(2, 1).shuffle(8, seed=1).batch(2)
    assert shards(with_policy(data, policy)) == {"shards": "[(2, 1)]"}


@pytest.mark.parametrize("policy", [POLICIES.OFF, POLICIES.HINT])
def test_shards_of_data_that_is_not_divided_again_do_not_count(policy):
    data = tf.data.Dataset.range(8).shard(2, 1).batch(2)
    assert shards(with_policy(data, policy)) == {"shards": "[]"}


@pytest.mark.parametrize(
    ("offered", "are"),
    [
        (["[(2, 0)]", "[(2, 1)]"], True),
        (["[(2, 0)]", "[(2, 0)]"], False),
        (["[]", "[]"], False),
        (["[(2, 0)]"], False),
    ],
)
def test_workers_with_other_shards_are_found(offered, are):
    found = [Fingerprint({}, offer={"shards": each}) for each in offered]
    assert are_shards(found) == are


CLUSTER = Cluster(
    ("/job:worker/replica:0/task:0", "/job:worker/replica:0/task:1"),
    ("a:1", "b:2"),
    0,
)


class Published:
    """A store in which the other worker has published its fingerprint."""

    def __init__(self, other):
        self.other = other
        self.read_by_all = []

    def all_gather(self, point, kind, text):
        return [text, self.other.to_json()]

    def linger(self, name):
        self.read_by_all.append(name)


def compare(mine, other):
    check = ConsistencyCheck(CLUSTER, Published(other), Progress(InFlight()))
    return check.compare("options", mine, "Do the same.")


@pytest.mark.parametrize(
    ("of_other", "said"),
    [(["zeros"], None), ([], "has none"), (["ones"], "has 1 of checksum")],
    ids=["alike", "one alone", "other values"],
)
def test_zeros_are_compared_with_whatever_comes_next(
    of_other, said, monkeypatch
):
    monkeypatch.setattr(keras_calls, "constant_of", lambda value: value)
    monkeypatch.setattr(keras_calls, "path_of_new_variable", lambda: "bias")
    options = Fingerprint({"a": 1})
    published = Published(options)
    # The other worker, whose store keeps what it publishes.
    other = ConsistencyCheck(CLUSTER, published, Progress(InFlight()))
    assert not other.note_constant(None)
    assert all(map(other.note_constant, of_other))
    store = Published(other.state(options)[0])
    check = ConsistencyCheck(CLUSTER, store, Progress(InFlight()))
    assert check.note_constant("zeros")
    if said is None:
        check.compare("options", options)
        return
    with pytest.raises(WorkersDifferError) as raised:
        check.compare("options", options)
    assert "variables of zeros and ones up to 'bias' (zeros)" in str(
        raised.value
    )
    assert f"worker 1 (b:2) {said}" in str(raised.value)


def test_workers_with_the_same_facts_go_on_with_what_all_offer():
    one = Fingerprint({"a": 1, "b": "x"}, offer={"seed": "of the chief"})
    other = Fingerprint(
        {"b": "x", "a": 1}, {"a": "label"}, {"seed": "of the other"}
    )
    found = compare(one, other)
    assert [each.offer["seed"] for each in found] == [
        "of the chief",
        "of the other",
    ]


@pytest.mark.parametrize(
    ("mine", "other", "said"),
    [
        (
            {"a": 1},
            {"a": 2},
            "first: worker 0 (a:1) has 1, worker 1 (b:2) has 2",
        ),
        (
            {"a": 1, "b": 2},
            {"a": 1},
            "b: worker 0 (a:1) has 2, worker 1 (b:2) has none",
        ),
        (
            {"a": 1},
            {"a": 1, "b": 2},
            "b: worker 0 (a:1) has none, worker 1 (b:2) has 2",
        ),
    ],
    ids=["another value", "the chief alone has it", "the other alone has it"],
)
def test_a_fact_that_differs_is_named_with_both_values(mine, other, said):
    with pytest.raises(WorkersDifferError) as raised:
        compare(Fingerprint(mine, {"a": "first"}), Fingerprint(other))
    assert str(raised.value) == (
        "All workers must have the same options. "
        f"Received: {said}. Do the same."
    )


ROWS, LABELS = np.arange(8.0).reshape(4, 2), np.array([0, 1, 1, 0])
NOISE = np.full([4, 2], 0.1)
SAMPLES = {
    "the same": ((ROWS, LABELS), (ROWS, LABELS), False),
    "in another order": ((ROWS, LABELS), (ROWS[::-1], LABELS + 1), True),
    "changed at random": ((ROWS, LABELS), (ROWS + NOISE, LABELS), False),
    "without targets": ((ROWS,), (ROWS[::-1],), True),
    "of one target": ((ROWS, 0 * LABELS), (ROWS[::-1], 0 * LABELS), True),
    "dicts": ({"a": ROWS}, {"a": ROWS[::-1]}, True),
    "ragged": (
        (tf.ragged.constant([[1], [2, 3]]), LABELS[:2]),
        (tf.ragged.constant([[1], [2, 3]]), LABELS[:2]),
        False,
    ),
    "of texts": (
        (ROWS, np.array(["a", "b"])),
        (ROWS + NOISE, np.array(["a", "b"])),
        False,
    ),
    "of objects": (
        (ROWS, np.array([[1], [1, 2], None], object)),
        (ROWS, np.array([[1], [1, 2], None], object)),
        False,
    ),
    "another size": ((ROWS, LABELS), (ROWS[:3], LABELS[:3]), True),
    "of no Python code": (None, None, False),
    "not there yet": ((ROWS, LABELS), None, False),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_other_samples_are_told_from_the_same_that_were_changed(name):
    one, another, are_other = SAMPLES[name]
    found = [Fingerprint({}, offer=of_batch(each)) for each in (one, another)]
    assert are_other_samples(found) is are_other
