"""What Keras must do for its calls to be compared, one test for each.

Keras runs without a strategy of ours, as in `test_keras_assumptions.py`.
"""

import gc
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce.compat import keras_calls, keras_door

pytestmark = pytest.mark.slow

X = np.arange(16, dtype="float32").reshape(8, 2) / 8
Y = np.zeros([8, 1], "float32")


class SpyStrategy(tf.distribute.MirroredStrategy):
    """TensorFlow's strategy behind the door, which notes the calls of Keras."""

    samples_to_measure = 3

    def __init__(self):
        keras_door.install()
        self.prepared, self.steps = [], []
        super().__init__(DEVICES[:2], tf.distribute.ReductionToOneDevice())
        self.calls, self.epochs, self.shuffled, self.arrays = [], [], [], []
        self.iterators, self.ended = [], []
        self.look, self.seen = lambda iterator: None, []

    def experimental_distribute_dataset(self, dataset, options=None):
        call = keras_calls.current_call()
        iterator = call.epoch_iterator
        self.calls.append(str(call))
        self.steps.append(call.steps)
        self.shuffled.append(keras_calls.shuffled_arrays(iterator))
        self.arrays.append(keras_calls.arrays(iterator))
        self.iterators.append(weakref.ref(iterator))
        self.seen.append(self.look(iterator))
        assert keras_calls.on_epochs(iterator, self.begin_epoch, self.end_epoch)
        return super().experimental_distribute_dataset(dataset, options)

    def prepare_model(self, model, batch):
        self.prepared.append((model, batch))

    def begin_epoch(self):
        call = keras_calls.current_call()
        self.epochs.append((str(call), call.is_first_epoch))

    def end_epoch(self):
        self.ended.append(str(keras_calls.current_call()))

    def reduce(self, reduce_op, value, axis):
        # Keras reduced batches to learn their shapes.
        assert not keras.tree.is_nested(value)
        return super().reduce(reduce_op, value, axis)


@pytest.fixture
def under_spy():
    strategy = SpyStrategy()
    with strategy.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    return strategy, model


def test_a_call_and_its_epochs_are_told(under_spy):
    strategy, model = under_spy
    model.fit(X, Y, batch_size=4, epochs=2, validation_data=(X, Y), verbose=0)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    model.predict(X, batch_size=4, verbose=0)
    assert strategy.calls == [
        "fit",
        "fit, epoch 1 of 2",
        "evaluate",
        "predict",
    ]
    assert strategy.epochs == [
        ("fit, epoch 1 of 2", True),
        ("evaluate in fit, epoch 1 of 2", True),
        ("fit, epoch 2 of 2", False),
        ("evaluate in fit, epoch 2 of 2", False),
        ("evaluate", False),
        ("predict", False),
    ]


def test_every_epoch_begins_also_where_an_iterator_goes_on(under_spy):
    strategy, model = under_spy
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
    model.fit(data, steps_per_epoch=1, epochs=3, verbose=0)
    assert [name for name, _ in strategy.epochs] == [
        f"fit, epoch {number} of 3" for number in (1, 2, 3)
    ]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("steps", [None, 2])
def test_every_epoch_ends_after_its_last_batch(steps, under_spy):
    strategy, model = under_spy
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    if steps is None:
        data = data.filter(lambda *_: True)  # Its length is not known.
    model.fit(data, steps_per_epoch=steps, epochs=2, verbose=0)
    ends = [each for each in strategy.ended if "epoch" in each]
    assert ends == ["fit, epoch 1 of 2", "fit, epoch 2 of 2"]


@pytest.mark.parametrize(
    ("steps_per_epoch", "expected"), [(None, (None, 2)), (1, (1, 2))]
)
def test_the_iterator_over_epochs_knows_the_steps(
    under_spy, steps_per_epoch, expected
):
    strategy, model = under_spy
    model.fit(X, Y, batch_size=4, steps_per_epoch=steps_per_epoch, verbose=0)
    assert strategy.steps == [expected]


def test_a_call_within_a_callback_is_told_as_such(under_spy):
    strategy, model = under_spy
    with strategy.scope():
        other = keras.models.clone_model(model)
        other.compile("sgd", "mse")

    class Calls(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            model.predict(X, batch_size=4, verbose=0)
            other.fit(X, Y, batch_size=4, epochs=3, verbose=0)
            seen.append(str(keras_calls.current_call()))

    seen = []
    model.fit(
        X, Y, batch_size=4, initial_epoch=1, epochs=2, callbacks=[Calls()]
    )
    assert strategy.calls == ["fit", "predict in fit, epoch 2 of 2", "fit"]
    assert strategy.epochs == [
        ("fit, epoch 2 of 2", True),
        ("predict in fit, epoch 2 of 2", True),
        ("fit, epoch 1 of 3", True),
        ("fit, epoch 2 of 3", False),
        ("fit, epoch 3 of 3", False),
    ]
    assert seen == ["fit, epoch 2 of 2"]


def test_no_call_lingers_after_an_error(under_spy):
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyError("of the user")

    _, model = under_spy
    for _ in range(2):
        with pytest.raises(KeyError):
            model.fit(X, Y, verbose=0, callbacks=[Fails()])
        assert keras_calls.current_call() is None


def test_each_thread_has_its_own_call(under_spy):
    _, model = under_spy
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            thread = threading.Thread(
                target=lambda: seen.append(keras_calls.current_call())
            )
            thread.start()
            thread.join()

    model.fit(X, Y, verbose=0, callbacks=[Looks()])
    assert seen == [None]


def test_no_call_is_known_of_a_model_without_such_a_strategy():
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(keras_calls.current_call())

    keras_door.install()
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=[Looks()])
    assert seen == [None]


def test_keras_reads_all_metrics_in_get_metrics_result(under_spy):
    strategy, model = under_spy
    with strategy.scope():
        model.compile("sgd", "mse", metrics=["mae"])
    lists, reads, known = [], set(), set()
    reduce = strategy.reduce

    def spied(reduce_op, value, axis):
        read = keras_calls.metrics_being_read()
        # TensorFlow's variables are also read where they are reset.
        if isinstance(value, tf.Variable) and read is not None:
            if not any(read is each for each in lists):
                lists.append(read)
            known.update((id(read), id(each)) for each in read)
            reads.add((id(read), id(value)))
        return reduce(reduce_op, value, axis)

    strategy.reduce = spied
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    assert reads == known
    # At least one reading of all of them in each epoch.
    assert len(lists) >= 2
    assert keras_calls.metrics_being_read() is None


def test_a_model_is_prepared_before_it_is_built(under_spy):
    strategy, model = under_spy
    model.fit(X, Y, batch_size=4, verbose=0)
    model.train_on_batch(X, Y)
    assert [each for each, _ in strategy.prepared] == [model] * 2
    shapes = [batch[0].shape for _, batch in strategy.prepared]
    # The first samples of arrays, and a batch as it is passed.
    assert shapes == [(3, 2), (8, 2)]


def test_no_call_is_found_outside_of_one():
    assert keras_calls.current_call() is None


def test_the_iterator_and_its_data_are_gone_when_the_call_has_ended(under_spy):
    strategy, model = under_spy
    gc.collect()
    gc.disable()
    try:
        model.fit(X, Y, batch_size=4, verbose=0)
        assert strategy.iterators[0]() is None
    finally:
        gc.enable()


def test_arrays_are_seen_with_how_keras_shuffles_them(under_spy):
    strategy, model = under_spy
    model.fit(X, Y, batch_size=3, verbose=0)
    model.fit(X, Y, batch_size=3, shuffle=False, verbose=0)
    model.fit(X, Y, batch_size=3, shuffle="batch", verbose=0)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(3)
    model.fit(data, verbose=0)
    shuffled, *others = strategy.shuffled
    (x, y), num_samples, batch_size = shuffled
    assert (num_samples, batch_size) == (8, 3)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert others == [None, None, None]
    assert [each is None for each in strategy.arrays] == [0, 0, 0, 1]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_py_dataset_is_shuffled_by_python(under_spy, shuffle):
    strategy, model = under_spy
    strategy.look = keras_calls.shuffles_in_python
    model.fit(Batches(), shuffle=shuffle, verbose=0)
    assert strategy.seen == [shuffle]


def test_the_path_of_a_variable_is_known_while_it_is_made():
    paths = []

    def make(next_creator, **kwargs):
        paths.append(keras_calls.path_of_new_variable())
        return next_creator(**kwargs)

    keras_door.install()
    with tf.variable_creator_scope(make):
        keras.layers.Dense(3, name="named").build([None, 2])
        with keras.StatelessScope():  # Its value is made after the block.
            keras.layers.Dense(1, name="lazy", use_bias=False).build([None, 2])
        tf.Variable(1.0)
    assert paths == ["named/kernel", "named/bias", "lazy/kernel", None]
    assert keras_calls.path_of_new_variable() is None


def test_the_first_batch_of_a_generator_is_the_one_that_is_read(under_spy):
    strategy, model = under_spy
    strategy.look = keras_calls.first_batch
    batches = ((X[first : first + 4], Y[:4]) for first in range(4))
    model.fit(batches, steps_per_epoch=2, verbose=0)
    model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(strategy.seen[0][0], X[:4])
    assert strategy.seen[-1] is None


class Passes(keras.utils.PyDataset):
    """Counts its passes in its batches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.passes = 0

    def __len__(self):
        return 3

    def on_epoch_end(self):
        self.passes += 1

    def __getitem__(self, index):
        return np.full([2, 2], 10.0 * self.passes + index), Y[:2]


@pytest.mark.parametrize("workers", [1, 2], ids=["plain", "enqueued"])
def test_the_first_batch_of_each_pass_of_a_py_dataset_is_told(
    under_spy, workers
):
    told = []

    def look(iterator):
        keras_calls.on_first_batches(
            iterator, lambda batch: told.append(float(batch[0][0, 0]))
        )
        assert keras_calls.is_py_dataset(iterator)

    strategy, model = under_spy
    strategy.look = look
    model.fit(Passes(workers=workers), epochs=3, shuffle=False, verbose=0)
    # Once more where Keras looks at shapes, or has begun a pass too many.
    assert set(told) >= {0.0, 10.0, 20.0}
    assert not any(number % 10 for number in told)


def test_the_batch_size_of_arrays_is_known(under_spy):
    strategy, model = under_spy
    strategy.look = keras_calls.batch_size_of_arrays
    model.predict(X, batch_size=4, verbose=0)
    model.predict(Passes(), verbose=0)
    assert strategy.seen == [4, None]
