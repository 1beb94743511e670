"""Assumptions about the parts of a Keras model and its compile options.

Nothing here runs a model. Code of the script that is asked for a config may
fail, which leaves out that config and nothing else.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import keras

# The layers and ops of a functional model, and the inputs of each.
from keras.src.models.functional import Functional as _Functional


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
