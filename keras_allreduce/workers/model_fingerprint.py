"""Finds models that compute something else on another worker.

Shapes agree, so nothing else shows it: another activation, another loss, layers
made in the order of a Python `set`. Where Keras's own config differs, that is
an error. Where it is about code of the script (a custom layer, a lambda), whose
attributes may differ for a good reason, it is a warning. Names are no
difference: Keras counts them in each process. Variables of the same names in
another order are one.
"""

import json
import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_config
from keras_allreduce.workers.consistency_check import (
    ORDER,
    REMEDY,
    ConsistencyCheck,
)
from keras_allreduce.workers.described import Described, described
from keras_allreduce.workers.fingerprint import (
    Fingerprint,
    combined,
    in_another_order,
)

MODEL = "models and compile options"

_COMPILED = (
    "loss",
    "loss_weights",
    "metrics",
    "weighted_metrics",
    "run_eagerly",
    "steps_per_execution",
)


@dataclass
class Facts:
    """The computation of a model, as far as its configs tell it.

    Attributes:
        known: Texts of Keras's own parts, by key.
        undecided: Texts of the script's parts.
        labels: Names of facts in messages.
        paths: Paths of the variables, in their order.
    """

    known: dict[str, str] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    def add(self, key: str, value: Described, label: str = "") -> None:
        """Adds a fact where it belongs."""
        (self.known if value.is_known else self.undecided)[key] = value.text
        self.labels[key] = label or key

    @property
    def checksum(self) -> str:
        """A checksum of all that is compared."""
        everything = [self.known, self.undecided, self.paths]
        return combined([json.dumps(everything, sort_keys=True)])


def facts_of(model: keras.Model) -> Facts:
    """The computation of a model, without running it."""
    facts = Facts()
    facts.add("model", described(type(model)))
    _add_layers(facts, keras_compat.layers(model)[1:])
    _add_operations(facts, model)
    options = keras_config.compile_options(model)
    for name in _COMPILED:
        if name in options:
            facts.add(name, described(options[name]))
    for number, each in enumerate(keras_compat.optimizers_of(model)):
        which = f"optimizer {number}" if number else "optimizer"
        _add_config(facts, which, each, which)
    facts.paths += paths_of(model)
    return facts


def paths_of(model: keras.Model) -> list[str]:
    """Paths of the variables, without the numbers that Keras counts."""
    automatic = {
        layer.name: _snake_case(type(layer).__name__)
        for layer in keras_compat.layers(model)
        if _is_automatic(layer)
    }
    return [
        "/".join(automatic.get(part, part) for part in variable.path.split("/"))
        for variable in model.variables
    ]


class ModelCheck:
    """Compares models between workers.

    Args:
        check: The consistency check.
    """

    def __init__(self, check: ConsistencyCheck):
        self._check = check
        self._known: weakref.WeakKeyDictionary[
            keras.Model, tuple[Any, int, Facts]
        ] = weakref.WeakKeyDictionary()

    def checksum(self, model: keras.Model) -> str:
        """A checksum of the computation of a model."""
        return self._facts(model).checksum

    def compare(self, model: keras.Model) -> None:
        """Compares a model whose checksums differ; call it on all workers.

        Args:
            model: The model of this worker.

        Raises:
            WorkersDifferError: If workers compute something else.
        """
        facts = self._facts(model)
        offer = {
            "undecided": json.dumps(facts.undecided),
            "paths": json.dumps(facts.paths),
        }
        mine = Fingerprint(facts.known, facts.labels, offer)
        found = self._check.state(mine)
        self._check.raise_differences(
            MODEL, in_another_order("variable", found), ORDER
        )
        rounded = [found[0], *(_rounded(found[0], each) for each in found[1:])]
        self._check.raise_differences(MODEL, rounded, REMEDY)
        _warn(found, self._check.name)

    def _facts(self, model: keras.Model) -> Facts:
        options = keras_config.compile_options(model)
        count = len(model.variables)
        known = self._known.get(model)
        # Changes without another `compile` have no effect in Keras.
        if known and known[0] is options and known[1] == count:
            return known[2]
        facts = facts_of(model)
        self._known[model] = options, count, facts
        return facts


def _add_layers(facts: Facts, layers: Sequence[Any]) -> None:
    # Code of the script may add a layer on one worker, such as one that prints.
    own = [layer for layer in layers if _is_known(layer)]
    others = [layer for layer in layers if not _is_known(layer)]
    facts.add("number of layers", described(len(own)))
    for kind, group in (("layer", own), ("custom layer", others)):
        for number, layer in enumerate(group):
            _add_config(
                facts, f"{kind} {number}", layer, f"layer {layer.name!r}"
            )


def _add_config(facts: Facts, key: str, thing: Any, label: str) -> None:
    whole, is_known = described(thing), _is_known(thing)
    facts.add(key, Described(whole.head, is_known), label)
    for name, value in whole.config.items():
        fact = Described(value.text, is_known and value.is_known)
        facts.add(f"{key} {name}", fact, f"`{name}` of {label}")


def _add_operations(facts: Facts, model: keras.Model) -> None:
    operations = keras_config.operations_of(model)
    is_known = all(_is_known(each.operation) for each in operations)
    for number, each in enumerate(operations):
        arguments = described(each.arguments)
        head = type(each.operation).__name__ if is_known else ""
        text = f"{head}{list(map(list, each.inputs))} {arguments.text}"
        facts.add(
            f"operation {number}",
            Described(text, is_known and arguments.is_known),
            f"inputs and arguments of operation {number} "
            f"({each.operation.name!r})",
        )


def _is_known(thing: Any) -> bool:
    """Whether a config of Keras describes the computation of an object."""
    return keras_config.is_of_keras(thing) and not isinstance(
        thing, keras.layers.Lambda
    )


def _is_automatic(layer: Any) -> bool:
    prefix = re.escape(_snake_case(type(layer).__name__))
    return re.fullmatch(rf"{prefix}(_\d+)?", layer.name) is not None


def _snake_case(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


_FLOAT = re.compile(r"(-?\d+\.\d+(?:e[+-]?\d+)?)")


def _rounded(chief: Fingerprint, other: Fingerprint) -> Fingerprint:
    """The other's, with the chief's text where only rounding differs."""
    facts = {
        key: chief.facts[key]
        if key in chief.facts and _are_close(chief.facts[key], text)
        else text
        for key, text in other.facts.items()
    }
    return Fingerprint(facts, other.labels, other.offer)


def _are_close(one: str, another: str) -> bool:
    ones, others = _FLOAT.split(one), _FLOAT.split(another)
    # Texts and numbers alternate.
    return ones[::2] == others[::2] and all(
        abs(float(a) - float(b)) <= 1e-4 * max(abs(float(a)), abs(float(b)))
        for a, b in zip(ones[1::2], others[1::2], strict=True)
    )


def _warn(found: Sequence[Fingerprint], name_of: Any) -> None:
    """Warns of the first difference in the script's own parts."""
    chief: Mapping[str, str] = json.loads(found[0].offer["undecided"])
    for rank, other in enumerate(found[1:], 1):
        theirs = json.loads(other.offer["undecided"])
        for key in chief.keys() & theirs.keys():
            if _are_close(chief[key], theirs[key]):
                continue
            label = found[0].labels.get(key, key)
            warnings.warn(
                "All workers must train the same model. Received: "
                f"{label}: {name_of(0)} has {chief[key]}, {name_of(rank)} has "
                f"{theirs[key]}. It is code of the script, whose attributes "
                "may differ; if they should not, run the same script on all "
                "workers.",
                stacklevel=2,
            )
            return
