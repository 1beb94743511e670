"""What workers compare, and that an epoch is what Keras makes of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_allreduce.workers.agreement import Agreement, Statement
from keras_allreduce.workers.cluster import Cluster
from keras_allreduce.workers.data_facts import steps_of_epochs
from keras_allreduce.workers.errors import WorkersDifferError
from keras_allreduce.workers.in_flight import InFlight
from keras_allreduce.workers.whereabouts import Whereabouts


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


CLUSTER = Cluster(
    ("/job:worker/replica:0/task:0", "/job:worker/replica:0/task:1"),
    ("a:1", "b:2"),
    0,
)


class Published:
    """A store in which the other worker has published a statement."""

    is_shared = True

    def __init__(self, other):
        self.other = other
        self.read_by_all = []

    def exchange(self, name, text):
        return [text, self.other.to_json()]

    def let_all_read(self, name):
        self.read_by_all.append(name)


def compare(mine, other):
    agreement = Agreement(CLUSTER, Published(other), Whereabouts(InFlight()))
    return agreement.compare("options", mine, "Do the same.")


def test_workers_that_state_the_same_go_on_with_the_statements_of_all():
    one = Statement({"a": 1, "b": "x"}, offer={"of": "the chief"})
    other = Statement({"b": "x", "a": 1}, {"a": "label"}, {"of": "the other"})
    found = compare(one, other)
    assert [each.offer for each in found] == [
        {"of": "the chief"},
        {"of": "the other"},
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
        compare(Statement(mine, {"a": "first"}), Statement(other))
    assert str(raised.value) == (
        "All workers must have the same options. "
        f"Received: {said}. Do the same."
    )
