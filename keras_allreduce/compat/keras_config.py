"""Assumptions about the configuration of Keras: of models and of threads.

Nothing here runs a model. Code of the script that is asked for a config may
fail, which leaves out that config and nothing else. Keras's global settings are
those of a thread, so the threads of replicas take them over.
"""

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

# Keras keeps its settings in a thread-local object that has no public name,
# and that `clear_session` replaces.
from keras.src.backend.common import global_state as _global_state

# The layers and ops of a functional model, and the inputs of each.
from keras.src.models.functional import Functional as _Functional

# Makes the generator from which `keras.random` draws without a seed.
from keras.src.random import seed_generator as _seed_generator

# Its name among the settings; Keras 3.10 has no constant for it.
_GENERATOR = getattr(
    _seed_generator, "GLOBAL_SEED_GENERATOR", "global_seed_generator"
)

# State of the running code, not settings of the thread.
_OF_THE_CALL = ("_scope", "_dict", "_stack", "_ctx")
_OF_THE_THREAD = ("uninitialized_variables", "tracking_on")


def is_of_keras(thing: Any) -> bool:
    """Whether a class, function or object is Keras's own, not the script's."""
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(getattr(owner, "__module__", ""))
    return module.split(".")[0] == "keras"


def config_of(thing: Any) -> dict[str, Any]:
    """The config of a layer, loss, optimizer, ...; empty if it has none."""
    try:
        with warnings.catch_warnings():
            # Keras warns that lambdas are unsafe to load, which nobody does.
            warnings.simplefilter("ignore")
            config = thing.get_config()
    except Exception:  # noqa: BLE001 (raised by code of the script)
        return {}
    return dict(config) if isinstance(config, dict) else {}


def compile_options(model: keras.Model) -> dict[str, Any]:
    """The arguments of the last `compile`, as passed; empty if there was none.

    Another `compile` makes another dictionary.
    """
    kept = getattr(model, "_compile_config", None)
    return getattr(kept, "config", {})


@dataclass(frozen=True)
class Operation:
    """A layer or op of a functional model.

    Attributes:
        operation: The same.
        inputs: For each call in this model, the numbers of the operations
            whose outputs it is called with.
        arguments: For each call, the other arguments.
    """

    operation: Any
    inputs: tuple[tuple[int, ...], ...]
    arguments: tuple[Any, ...]


def operations_of(model: keras.Model) -> list[Operation]:
    """The operations of a functional model, inputs first; of others, none."""
    if not isinstance(model, _Functional):
        return []
    operations = list(model.operations)
    # Keras orders them from the outputs; inputs have the order of `inputs`.
    inputs = [tensor._keras_history.operation for tensor in model.inputs]
    rest = [each for each in operations if all(each is not i for i in inputs)]
    operations = [*inputs, *rest]
    number = {id(each): index for index, each in enumerate(operations)}
    of_model = {
        id(node) for nodes in model._nodes_by_depth.values() for node in nodes
    }
    found = []
    for each in operations:
        calls = [n for n in each._inbound_nodes if id(n) in of_model]
        sources = tuple(
            tuple(number[id(p.operation)] for p in call.parent_nodes)
            for call in calls
        )
        others = tuple(_without_tensors(call.arguments) for call in calls)
        found.append(Operation(each, sources, others))
    return found


def _without_tensors(arguments: Any) -> list[Any]:
    flat = keras.tree.flatten((arguments.args, arguments.kwargs))
    return [leaf for leaf in flat if not isinstance(leaf, keras.KerasTensor)]


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
