"""A gradient crosses few of our frames from Keras's step to its sum.

`pytest -s` prints the paths.
"""

import keras
import pytest
import tensorflow as tf
import workers
from call_path import Recorder, returns
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy

pytestmark = pytest.mark.slow


def assert_short(paths, most):
    assert paths
    for path in map(list, {tuple(path) for path in paths}):
        print(f"\n{len(path)} frames, {returns(path)} returns")
        print(*path, sep="\n")
        assert len(path) <= most
        assert returns(path) <= 1


def test_coming_back_to_a_file_is_counted():
    assert returns(["a:f", "a:g", "b:h"]) == 0
    assert returns(["a:f", "b:h", "a:g", "c:i", "b:h"]) == 2


def test_in_one_process_at_most_11_frames(monkeypatch):
    add_n = Recorder(tf.add_n)
    monkeypatch.setattr(tf, "add_n", add_n)
    strategy = AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(tf.ones([8, 3]), tf.ones([8, 1]), verbose=0)
    assert_short(add_n.paths_of_gradients(), most=11)


def test_between_workers_at_most_13_frames():
    paths, _ = workers.results("paths_of_gradients")
    # The longest is that of an exchange, the other one that of the ring.
    functions = {frame.split(":")[1] for path in paths for frame in path}
    assert {"all_gather", "_exchange"} < functions
    assert any("_exchange" not in str(path) for path in paths)
    assert_short(paths, most=13)
