"""A step of Keras on all replicas leaves the model as it was."""

from threading import Thread

import pytest
from five_devices import DEVICES
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


def test_the_state_of_a_replica_ends_with_its_step():
    outside = replica.current()
    with replica.running(Replica(share=0.5)):
        assert replica.current() == Replica(share=0.5)
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
