"""A step of Keras on all replicas leaves the model as it was."""

import itertools
import traceback
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import tensorflow as tf
from conftest import DEVICES
from linear_model import X, Y, compiled, linear

import keras_allreduce
from keras_allreduce.one_device import replica
from keras_allreduce.one_device.replica import Replica


def test_objects_of_the_model_are_as_before_after_a_step():
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(X, Y, batch_size=5, verbose=0)
    for owner in (model, model.optimizer):
        assert not {"apply", "scale_loss", "compute_loss"} & set(vars(owner))


def frames_of_ours():
    """Files of our functions in the stack of this thread, outermost first."""
    root = str(Path(keras_allreduce.__file__).parent)
    return [
        frame.filename
        for frame in traceback.extract_stack()
        if frame.filename.startswith(root)
        and frame.name != "<listcomp>"  # No frame from Python 3.12 on.
    ]


def test_few_of_our_frames_lie_between_keras_and_the_sum(monkeypatch):
    stacks = []
    add_n = tf.add_n

    def spy(*args, **kwargs):
        stacks.append(frames_of_ours())
        return add_n(*args, **kwargs)

    monkeypatch.setattr(tf, "add_n", spy)
    strategy = keras_allreduce.AllReduceStrategy(DEVICES[:2])
    with strategy.scope():
        model = compiled(linear())
    model.fit(X[:4], Y[:4], batch_size=4, verbose=0)
    (stack,) = stacks
    assert len(stack) <= 11
    visits = [file for file, _ in itertools.groupby(stack)]
    assert len(visits) - len(set(visits)) <= 1


def test_the_state_of_a_replica_ends_with_its_step():
    outside = replica.current()
    with replica.running(Replica(share=0.5)):
        replica.become(replace(replica.current(), scaled="loss"))
        assert replica.current() == Replica(share=0.5, scaled="loss")
        with replica.running(Replica(share=2.0)):
            assert replica.current() == Replica(share=2.0)
        assert replica.current().share == 0.5
    assert replica.current() is outside
    assert outside == Replica()


def test_the_state_of_a_replica_ends_with_a_step_that_fails():
    with pytest.raises(KeyError), replica.running(Replica(share=0.5)):
        raise KeyError
    assert replica.current() == Replica()


def test_each_thread_has_its_own_replica():
    seen = []
    with replica.running(Replica(share=0.5)):
        thread = Thread(target=lambda: seen.append(replica.current()))
        thread.start()
        thread.join()
    assert seen == [Replica()]
