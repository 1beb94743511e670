"""Keras's settings, which are those of a thread, in the threads of replicas."""

import random
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

# Keras keeps its settings in a thread-local object that has no public name,
# and that `clear_session` replaces.
from keras.src.backend.common import global_state as _global_state

# Makes the generator from which `keras.random` draws without a seed.
from keras.src.random import seed_generator as _seed_generator

# Its name among the settings; Keras 3.10 has no constant for it.
_GENERATOR = getattr(
    _seed_generator, "GLOBAL_SEED_GENERATOR", "global_seed_generator"
)

# State of the running code, not settings of the thread.
_OF_THE_CALL = ("_scope", "_dict", "_stack", "_ctx")
_OF_THE_THREAD = ("uninitialized_variables", "tracking_on")


def settings() -> dict[str, Any]:
    """The settings of this thread: dtype policy, flash attention, seeds."""
    return {
        name: value
        for name, value in vars(_global_state.GLOBAL_STATE_TRACKER).items()
        if not name.endswith(_OF_THE_CALL) and name not in _OF_THE_THREAD
    }


def take_over(settings_of_another: Mapping[str, Any]) -> None:
    """Gives this thread the settings of another."""
    for name, value in settings_of_another.items():
        _global_state.set_global_attribute(name, value)


def make_generator_of_unseeded(strategy: tf.distribute.Strategy) -> None:
    """Makes the generator from which `keras.random` draws without a seed.

    Keras makes it when it is first needed, which cannot be in a replica. Other
    seeds are drawn as if it had not been made.
    """
    generator = _global_state.get_global_attribute(_GENERATOR)
    if generator is not None:
        state = generator.state.value
        if not isinstance(state, tf.distribute.DistributedValues):
            return
        if strategy.extended.variable_created_in_scope(state):
            return
        _global_state.set_global_attribute(_GENERATOR, None)
    before = random.getstate()
    with tf.init_scope(), strategy.scope():
        _seed_generator.global_seed_generator()
    random.setstate(before)
