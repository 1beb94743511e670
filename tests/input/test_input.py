"""How distributed data sets are iterated: what is made, read and freed."""

import contextlib
import functools
import gc
import multiprocessing
import os
import threading

import keras
import numpy as np
import pytest
import small_model
import tensorflow as tf
from five_devices import DEVICES
from graph_walk import ops_of_type

from keras_allreduce import AllReduceStrategy
from keras_allreduce.compat import (
    datasets,
    iterators,
    multi_device,
)
from keras_allreduce.compat.multi_device import Source
from keras_allreduce.input import dataset as input_dataset
from keras_allreduce.input.release import RELEASER, Handles, Releaser


def strategy(replicas=2):
    return AllReduceStrategy(DEVICES[:replicas])


def mirrored(replicas):
    return tf.distribute.MirroredStrategy(
        DEVICES[:replicas], tf.distribute.ReductionToOneDevice()
    )


def numbers(count, batch_size, **arguments):
    data = tf.data.Dataset.from_tensor_slices(np.arange(count))
    return data.batch(batch_size, **arguments)


def read(maker, make_dataset, epochs=2):
    """The parts of each epoch, as a strategy hands them out."""
    keras.utils.set_random_seed(1)
    data = make_dataset(maker)
    found = []
    for _ in range(epochs):
        found.append(
            [
                [
                    part.numpy().tolist()
                    for part in maker.experimental_local_results(batch)
                ]
                for batch in data
            ]
        )
    return found


def distributed(make):
    """A data set that is given to the strategy as it is."""
    return lambda maker: maker.experimental_distribute_dataset(make())


def with_options(data, **attributes):
    options = tf.data.Options()
    for name, value in attributes.items():
        setattr(options, name, value)
    return data.with_options(options)


def batched_model_data():
    """Three batches for `small_model`."""
    arrays = small_model.X, small_model.Y
    return tf.data.Dataset.from_tensor_slices(arrays).batch(8)


def of_generator():
    return tf.data.Dataset.from_generator(
        lambda: iter(np.arange(12).reshape(3, 4)),
        output_signature=tf.TensorSpec([None], tf.int64),
    )


DATA = {
    "even": lambda: numbers(48, 12),
    "uneven": lambda: numbers(41, 12),
    "empty replicas": lambda: numbers(13, 12),
    "one sample": lambda: numbers(1, 12),
    "nothing": lambda: numbers(12, 12).take(0),
    "static shapes": lambda: numbers(48, 12, drop_remainder=True),
    "shuffled": lambda: tf.data.Dataset.range(40).shuffle(40, seed=3).batch(12),
    "shuffled with the global seed": lambda: (
        tf.data.Dataset.range(40).shuffle(40).batch(12)
    ),
    "mapped in parallel": lambda: (
        numbers(41, 12)
        .map(lambda x: x * 2, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    ),
    "not deterministic": lambda: with_options(
        numbers(12, 12).map(lambda x: x + 1), deterministic=False
    ),
    "slack": lambda: with_options(numbers(24, 12), experimental_slack=True),
    "a generator": of_generator,
}


@functools.cache
def read_by_tensorflow(name, replicas):
    return read(mirrored(replicas), distributed(DATA[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_every_replica_reads_what_it_reads_from_tensorflow(name):
    ours = read(strategy(3), distributed(DATA[name]))
    assert ours == read_by_tensorflow(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", tf.data.experimental.AutoShardPolicy)
def test_each_batch_is_split_by_itself_whatever_is_sharded(policy):
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    ours = read(
        strategy(3),
        distributed(lambda: numbers(41, 12).with_options(options)),
    )
    assert ours == read_by_tensorflow("uneven", 3)


@pytest.mark.slow
def test_a_last_batch_from_files_is_split_too(tmp_path):
    (tmp_path / "lines").write_text("a\nb\nc\nd\ne\nf\n")

    def lines():
        return tf.data.TextLineDataset(str(tmp_path / "lines")).batch(4)

    (first, last) = read(strategy(2), distributed(lines), epochs=1)[0]
    assert first == [[b"a", b"b"], [b"c", b"d"]]
    assert last == [[b"e"], [b"f"]]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3])
def test_data_sets_of_a_function_are_read_as_from_tensorflow(replicas):
    def make(maker):
        return maker.distribute_datasets_from_function(
            lambda context: numbers(
                13, 12 // context.num_replicas_in_sync
            ).shard(context.num_input_pipelines, context.input_pipeline_id)
        )

    assert read(strategy(replicas), make) == read(mirrored(replicas), make)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 3])
def test_buffer_sizes_of_the_user_hold(size):
    options = tf.distribute.InputOptions(
        experimental_per_replica_buffer_size=size
    )

    def make(maker):
        return maker.experimental_distribute_dataset(numbers(41, 12), options)

    assert read(strategy(), make) == read(mirrored(2), make)


@pytest.mark.slow
def test_a_part_is_on_the_device_of_its_replica():
    both = strategy()
    batch = next(iter(both.experimental_distribute_dataset(numbers(8, 4))))
    assert [
        tf.DeviceSpec.from_string(part.device).device_index
        for part in batch.values
    ] == [0, 1]


@pytest.mark.slow
def test_ragged_sparse_and_text_parts_pass():
    ragged = tf.ragged.constant([[1], [2, 3], [], [4]])
    data = tf.data.Dataset.from_tensor_slices(
        {"ragged": ragged, "text": ["a", "b", "c", "d"]}
    ).batch(4)
    for batch in strategy().experimental_distribute_dataset(data):
        assert batch["ragged"].values[0].to_list() == [[1], [2, 3]]
        assert batch["text"].values[1].numpy().tolist() == [b"c", b"d"]


@pytest.mark.slow
def test_a_function_reads_an_iterator_to_its_end():
    both = strategy()
    iterator = iter(both.experimental_distribute_dataset(numbers(13, 12)))

    @tf.function
    def total(iterator):
        sums = tf.constant(0, tf.int64)
        for batch in iterator:
            for part in both.experimental_local_results(batch):
                sums += tf.reduce_sum(part)
        return sums

    assert int(total(iterator)) == sum(range(13))


@pytest.mark.slow
def test_a_function_in_a_function_reads_in_order():
    both = strategy()

    @tf.function
    def inner(iterator):
        return both.experimental_local_results(iterator.get_next())

    @tf.function
    def outer(iterator):
        return inner(iterator), inner(iterator)

    iterator = iter(both.experimental_distribute_dataset(numbers(8, 4)))
    first, second = tf.nest.map_structure(
        lambda part: part.numpy().tolist(), outer(iterator)
    )
    assert [list(part) for part in first] == [[0, 1], [2, 3]]
    assert [list(part) for part in second] == [[4, 5], [6, 7]]


@pytest.mark.slow
def test_many_reads_in_one_graph_are_no_mistake():
    five = strategy(5)
    iterator = iter(five.experimental_distribute_dataset(numbers(200, 20)))

    @tf.function(autograph=False)
    def last(iterator):
        for _ in range(9):
            batch = iterator.get_next()
        return batch

    assert last(iterator).values[4].numpy().tolist() == [176, 177, 178, 179]


@pytest.mark.slow
def test_a_function_may_make_the_iterator():
    both = strategy()
    data = both.experimental_distribute_dataset(numbers(13, 12))

    @tf.function
    def total():
        sums = tf.constant(0, tf.int64)
        for batch in data:
            for part in both.experimental_local_results(batch):
                sums += tf.reduce_sum(part)
        return sums

    assert int(total()) == sum(range(13))


def test_an_iterator_that_a_spec_makes_again_equals_the_first():
    data = tf.data.Dataset.range(8).batch(4)
    first, other = (
        iter(strategy().experimental_distribute_dataset(data)) for _ in "ab"
    )
    spec = first._type_spec
    again = spec._from_components(spec._to_components(first))
    assert again._iterators == first._iterators
    assert len({*again._iterators, *first._iterators}) == 1
    assert other._iterators != first._iterators


# How much is made ------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Counts the iterators that are made for replicas."""
    count = []
    stock = iterators.RoundRobin.__init__

    def counted(self, iterator, devices):
        count.append(iterator)
        stock(self, iterator, devices)

    monkeypatch.setattr(iterators.RoundRobin, "__init__", counted)
    # Those made in eager mode, not what a traced function was called with.
    return lambda: sum(hasattr(each, "_dataset") for each in count)


@pytest.fixture
def traced(monkeypatch):
    """Counts the functions that are traced."""
    names = []
    stock = tf.Graph.__init__

    def counted(self, *args, **kwargs):
        names.append(type(self).__name__)
        stock(self, *args, **kwargs)

    monkeypatch.setattr(tf.Graph, "__init__", counted)
    return lambda: names.count("FuncGraph")


@pytest.mark.slow
def test_an_epoch_makes_one_iterator_and_traces_nothing(made, traced):
    model = small_model.make_model(strategy())
    data = batched_model_data()
    model.fit(data, epochs=1, verbose=0)
    counts = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: counts.append((made(), traced()))
    )
    model.fit(data, epochs=5, verbose=0, callbacks=[count])
    assert np.diff([number for number, _ in counts]).tolist() == [1] * 4
    assert np.diff([number for _, number in counts]).tolist() == [0] * 4


@pytest.mark.slow
def test_to_distribute_a_data_set_traces_nothing(traced):
    # Dense tensors in any structure, also of unknown length.
    data = numbers(41, 12).map(lambda x: {"x": x, "y": (x, x)})
    both, before = strategy(), traced()
    for _ in range(3):
        both.experimental_distribute_dataset(data)
    assert traced() == before


@pytest.mark.slow
def test_evaluate_of_a_built_model_makes_one_iterator(made):
    model = small_model.make_model(strategy())
    small_model.fit(model, verbose=0)
    before = made()
    model.evaluate(small_model.X, small_model.Y, verbose=0)
    assert made() == before + 1
    model.predict(small_model.X, verbose=0)
    assert made() == before + 2


@pytest.mark.slow
def test_an_iterator_that_nobody_reads_is_not_made(made):
    data = strategy().experimental_distribute_dataset(numbers(8, 4))
    iterator = iter(data)
    assert made() == 0
    next(iterator)
    assert made() == 1


@pytest.mark.slow
def test_seeds_are_drawn_in_the_order_of_the_calls():
    def orders(maker):
        keras.utils.set_random_seed(1)
        data = maker.experimental_distribute_dataset(
            tf.data.Dataset.range(40).shuffle(40, seed=3).batch(40)
        )
        first, _, third = iter(data), iter(data), iter(data)
        iter(data)
        return [
            [part.numpy().tolist() for part in next(iterator).values]
            for iterator in (third, first, iter(data))
        ]

    assert orders(strategy()) == orders(mirrored(2))


# Freeing ---------------------------------------------------------------------


def threads_of_process():
    return len(os.listdir("/proc/self/task"))


def files_of_process():
    return len(os.listdir("/proc/self/fd"))


def resident_mib():
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def freed():
    gc.collect()
    assert RELEASER.wait(timeout_seconds=300)


@pytest.mark.slow
def test_the_threads_of_a_collected_iterator_end():
    data = strategy().experimental_distribute_dataset(
        numbers(4000, 4).map(lambda x: x + 1, tf.data.AUTOTUNE)
    )
    next(iter(data))
    freed()
    before = threads_of_process()
    several = [iter(data) for _ in range(6)]
    for iterator in several:
        next(iterator)
    assert threads_of_process() >= before + 6
    del several, iterator
    freed()
    assert threads_of_process() <= before + 7  # those that free


class Owner:
    pass


def owned(releaser, kind):
    """An owner, and the handles of one `kind` that are freed with it."""
    owner, handles = Owner(), Handles(lambda: [kind()], threading.RLock())
    handles.make()
    releaser.when_collected(owner, handles)
    return owner, handles


@pytest.mark.slow
def test_freeing_waits_in_other_threads_than_this():
    begun, end = threading.Event(), threading.Event()
    names = []

    class Slow:
        def __del__(self):
            names.append(threading.current_thread().name)
            begun.set()
            end.wait(60)

    releaser = Releaser()
    owner, handles = owned(releaser, Slow)
    del owner, handles
    assert begun.wait(60)
    assert releaser.pending == 1
    assert not releaser.wait(timeout_seconds=0.01)
    end.set()
    assert releaser.wait(timeout_seconds=60)
    assert names[0].startswith("keras_allreduce_release")


@pytest.mark.slow
def test_one_slow_iterator_does_not_keep_the_others():
    end = threading.Event()
    done = threading.Event()

    class Slow:
        def __del__(self):
            end.wait(60)

    class Quick:
        def __del__(self):
            done.set()

    releaser = Releaser()
    for kind in (Slow, Quick):
        owner, handles = owned(releaser, kind)
        del owner, handles
    assert done.wait(60)
    end.set()


@pytest.mark.slow
def test_the_end_of_the_process_does_not_wait_for_long():
    end = threading.Event()

    class Slow:
        def __del__(self):
            end.wait(60)

    releaser = Releaser()
    _owner, handles = owned(releaser, Slow)
    releaser.free_all(timeout_seconds=0.01)
    assert releaser.pending == 1
    with pytest.raises(RuntimeError, match="until the process ends"):
        handles.get()
    end.set()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_frees_what_it_makes():
    done = multiprocessing.get_context("fork").Event()

    class Iterator:
        def __del__(self):
            done.set()

    def make_and_drop():
        owned(RELEASER, Iterator)
        RELEASER.wait(timeout_seconds=60)
        os._exit(0)

    owner, _handles = owned(RELEASER, list)  # starts the threads here
    child = multiprocessing.get_context("fork").Process(target=make_and_drop)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert done.is_set()
    del owner


@pytest.mark.slow
@pytest.mark.parametrize(
    "epochs", [50, pytest.param(200, marks=pytest.mark.nightly)]
)
def test_many_epochs_leave_nothing_behind(epochs):
    model = small_model.make_model(strategy())
    data = batched_model_data()
    fit = {"validation_data": data, "verbose": 0}
    model.fit(data, epochs=20, **fit)
    freed()
    before = threads_of_process(), files_of_process(), resident_mib()
    model.fit(data, epochs=epochs, **fit)
    freed()
    after = threads_of_process(), files_of_process(), resident_mib()
    assert after[0] <= before[0] + 8  # those that free, and those of TensorFlow
    assert after[1] <= before[1]
    assert after[2] <= before[2] + 40


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop_training", "an error"])
def test_an_iterator_is_freed_however_fit_ends(how):
    model = small_model.make_model(strategy())

    class Ends(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if how == "an error":
                raise KeyError("mine")
            self.model.stop_training = True

    with contextlib.suppress(KeyError):
        small_model.fit(model, verbose=0, callbacks=[Ends()])
    freed()
    assert RELEASER.pending == 0


# Several devices that are no CPU devices ------------------------------------


@pytest.mark.slow
def test_the_functions_of_devices_are_traced_once(traced):
    """Host devices stand in for GPUs: the functions are the same."""
    input_dataset._functions.clear()
    data = numbers(8, 2)
    source = Source(data, DEVICES[0], _full(DEVICES[:2]), None)
    first = input_dataset._prefetched_to_devices(data, source)
    before = traced()
    assert before > 0
    second = input_dataset._prefetched_to_devices(data, source)
    other = numbers(4, 2)
    third = input_dataset._prefetched_to_devices(other, source)
    assert traced() == before
    assert _pairs(first) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    # Each has its own place in the data.
    assert _pairs(second) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert _pairs(third) == [[[0, 1], [2, 3]]]


def _full(devices):
    return tuple(
        "/job:localhost/replica:0/task:0" + device.replace("cpu", "device:CPU")
        for device in devices
    )


def _pairs(iterator):
    found = []
    while True:
        try:
            batch = iterator.get_next_as_list()
        except tf.errors.OutOfRangeError:
            return found
        found.append([part.numpy().tolist() for part in batch])


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(input_dataset, "on_gpus", lambda devices: True)
    input_dataset._functions.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_prefetched_parts_are_those_of_tensorflow(name, as_on_gpus):
    ours = read(strategy(3), distributed(DATA[name]))
    assert input_dataset._functions
    assert ours == read_by_tensorflow(name, 3)


@pytest.mark.slow
def test_fit_with_prefetched_parts_traces_once(as_on_gpus, traced):
    model = small_model.make_model(strategy())
    data = batched_model_data()
    model.fit(data, epochs=1, verbose=0)
    counts = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: counts.append(traced())
    )
    history = model.fit(data, epochs=4, verbose=0, callbacks=[count])
    assert np.diff(counts).tolist() == [0] * 3
    assert len(history.history["loss"]) == 4


# Parts -----------------------------------------------------------------------


def _of_elements(*sizes):
    return tf.data.Dataset.from_tensor_slices(
        tf.ragged.constant([list(range(size)) for size in sizes])
    )


@pytest.mark.parametrize(
    "data",
    [numbers(7, 3), _of_elements(1, 0, 2, 3, 1, 1, 2).batch(3)],
    ids=["dense", "ragged"],
)
def test_each_batch_becomes_one_part_for_every_replica(data):
    # So no replica has to be asked whether it has a part.
    rows = [part.shape[0] for part in datasets._parts(data, 4)]
    assert rows == [1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 0]


def test_a_sparse_part_has_the_known_inner_dimensions():
    whole = tf.sparse.from_dense(tf.eye(6, 3))
    data = tf.data.Dataset.from_tensor_slices((whole, tf.zeros(6))).batch(4)
    spec, _ = datasets._parts(data, 2).element_spec
    assert spec.shape.as_list() == [None, 3]


@pytest.mark.parametrize(("size", "of_a_part"), [(8, 2), (7, None)])
def test_a_part_has_a_known_size_where_all_have_the_same(size, of_a_part):
    parts = datasets._parts(numbers(size, size, drop_remainder=True), 4)
    assert parts.element_spec.shape.as_list() == [of_a_part]


@pytest.mark.slow
def test_a_step_reads_its_parts_without_a_condition():
    both = strategy()
    iterator = iter(both.experimental_distribute_dataset(numbers(7, 3)))

    @tf.function
    def read_one():
        return both.experimental_local_results(next(iterator))

    graph = read_one.get_concrete_function().graph
    assert len(ops_of_type(graph, "IteratorGetNext")) == 2
    assert not {op.type for op in graph.get_operations()} & {"If", "While"}
    rows = [[len(part) for part in read_one()] for _ in range(3)]
    assert rows == [[2, 1], [2, 1], [1, 0]]
    with pytest.raises(tf.errors.OutOfRangeError):
        read_one()


PAIRS = tf.data.Dataset.from_tensor_slices((tf.zeros([8, 2]), tf.zeros([8])))
PAIRS_IN_BATCHES = PAIRS.shuffle(4).batch(3)
OF_ONE_LENGTH = {
    "batch": PAIRS_IN_BATCHES,
    "padded_batch": PAIRS.padded_batch(3),
    "parallel": PAIRS.batch(3, num_parallel_calls=2).prefetch(1),
    "shuffle, cache, repeat": PAIRS_IN_BATCHES.shuffle(2).cache().repeat(2),
    "shard, skip, take": PAIRS_IN_BATCHES.shard(1, 0).skip(1).take(1),
    "filter": PAIRS_IN_BATCHES.filter(lambda *_: True),
    "with_options": PAIRS_IN_BATCHES.with_options(tf.data.Options()),
    "concatenate": PAIRS_IN_BATCHES.concatenate(PAIRS_IN_BATCHES),
}
OF_ANY_LENGTH = {
    "no batch": PAIRS,
    "map": PAIRS_IN_BATCHES.map(lambda x, y: (x, y[:1])),
    "zip": tf.data.Dataset.zip(numbers(8, 3), numbers(8, 2)),
    "unbatch": PAIRS_IN_BATCHES.unbatch(),
    "rebatch": PAIRS_IN_BATCHES.rebatch(2),
    "concatenate": PAIRS_IN_BATCHES.concatenate(
        PAIRS_IN_BATCHES.map(lambda x, y: (x, y[:1]))
    ),
}


@pytest.mark.parametrize("name", OF_ONE_LENGTH)
def test_parts_of_a_batch_are_known_to_have_one_length(name):
    assert datasets.ends_in_batch(OF_ONE_LENGTH[name])
    for x, y in OF_ONE_LENGTH[name]:
        assert len(x) == len(y)


@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_parts_of_a_batch_may_differ_in_length(name):
    assert not datasets.ends_in_batch(OF_ANY_LENGTH[name])


def one_by_one(*batches):
    yield from batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "maps"),
    [
        (lambda: PAIRS.batch(3), 0),
        (lambda: PAIRS.batch(3).map(lambda x, y: (x, y)), 2),
        (lambda: one_by_one((np.ones([3, 2]), np.ones(3))), 1),
        (lambda: one_by_one((np.ones([3, 2]), np.ones(3), None)), 1),
    ],
    ids=["batch", "batch and map", "generator", "generator of None"],
)
def test_keras_data_is_changed_in_one_map_at_most(data, maps):
    both, given = strategy(2), []
    with both.scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    stock = datasets.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets,
            "split",
            lambda dataset, extended: (
                given.append(dataset) or stock(dataset, extended)
            ),
        )
        model.fit(data(), verbose=0)
    assert count_of_maps(given[0]) == maps


def count_of_maps(dataset):
    sources = dataset._inputs()
    is_map = type(dataset).__name__ == "_MapDataset"
    return is_map + sum(map(count_of_maps, sources))


# Other versions of TensorFlow ------------------------------------------------


@pytest.mark.slow
def test_what_is_not_known_stays_tensorflows_with_one_warning(monkeypatch):
    def fails(*args):
        raise AttributeError("'_datasets' is gone")

    monkeypatch.setattr(multi_device, "sources", fails)
    monkeypatch.setattr(input_dataset, "_warned", False)
    warnings = []
    monkeypatch.setattr(
        input_dataset.logging, "warning", lambda *args: warnings.append(args)
    )
    both = strategy()
    for _ in range(2):
        data = both.experimental_distribute_dataset(numbers(13, 12))
        assert type(data) is datasets.SplitDataset
    ((message, *values),) = warnings
    assert "own iterators" in message % tuple(values)
    assert len(list(data)) == 2


@pytest.mark.slow
def test_what_cannot_be_split_is_left_to_tensorflow(monkeypatch):
    def fails(*args):
        raise AttributeError("'_input_workers' is gone")

    monkeypatch.setattr(datasets, "split", fails)
    monkeypatch.setattr(input_dataset, "_warned", False)
    ours = read(strategy(2), distributed(DATA["uneven"]))
    assert ours == read_by_tensorflow("uneven", 2)
    assert input_dataset._warned
