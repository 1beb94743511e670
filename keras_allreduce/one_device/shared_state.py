"""State that replicas assign on their own, made that of one model again.

A layer that gathers statistics, such as BatchNormalization, updates them on
each replica from its own samples, and a custom step may keep an average, a
counter, or weights that it updates itself. Then each replica would go on with
its own, and the saved model would be that of replica 0. So after each step
every replica gets the state of one device:

    a mean over samples     the mean of all replicas, weighted by samples
    a sum over samples      the kept share of the value before, and all addends
    neither                 that of the first replica

Keras's layers keep means. What others keep is measured, as losses are. A queue
or a last value is neither; the first replica's is that of a part of the batch,
at the scale of one device's.

The replicas run the Python code of a step in turn, each as far as the next
merge_call, and a measurement runs it before them. So that all of them find the
numbers in attributes of the model as on one device, they are put back:

    self.n += 1     measured   replica 0   replica 1   after the step
    found              0           0           0
    left               1           1           1             1

Only numbers and strings: anything else that a step changes, such as a list, is
shared by the replicas.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.compat import keras_door
from keras_allreduce.one_device import reduction, replica
from keras_allreduce.one_device.reduction import FIRST, SUM, Reductions
from keras_allreduce.one_device.replica import Replicas
from keras_allreduce.one_device.shares import BatchShares
from keras_allreduce.reduce import packing

_KINDS = (bool, int, float, str)


class SharedState:
    """The variables that the replicas assign in a step, each its own part.

    Args:
        model: The model whose step it is.
        replicas: The replicas of this worker.
        reductions: Which of them are means or sums over samples.
    """

    def __init__(
        self, model: keras.Model, replicas: Replicas, reductions: Reductions
    ):
        self._replicas = replicas
        self._reductions = reductions
        # XLA may fuse the same ops in other ways on each replica, so that even
        # statistics of one batch differ in the last bit.
        self._alike: frozenset[int] = frozenset()
        if not keras_door.compiles_replicas(model):
            self._alike = synchronized_variables(model)
        # Its reduction, and the kept share of the value before, for sums.
        self._assigned: dict[int, tuple[Any, str, Any]] = {}

    def note(self, variable: Any) -> None:
        """A replica is about to assign to its own part of a variable."""
        this = replica.current()
        if id(variable) in this.assigned:
            return
        this.assigned.add(id(variable))
        if id(variable) not in self._assigned:
            found = self._reductions.of(*reduction.state_key(variable))
            before = None
            if found.kind == SUM:
                before = read_outside_of_branches(variable)
                if found.decay != 1.0:
                    before *= tf.cast(found.decay, before.dtype)
            self._assigned[id(variable)] = variable, found.kind, before

    def agree(self, shares: BatchShares) -> None:
        """Gives every replica of all workers the state of one device.

        Args:
            shares: How the batch is divided.
        """
        groups: dict[Any, list[Any]] = {}
        for variable, kind, before in self._assigned.values():
            if id(variable) in self._alike or not _is_number(variable.dtype):
                continue
            group = variable.dtype, kind
            groups.setdefault(group, []).append((variable, before))
        for (_, kind), members in groups.items():
            variables = [variable for variable, _ in members]
            if kind == SUM:
                befores = [before for _, before in members]
                self._add_up(variables, befores, shares.has_samples)
            elif kind == FIRST:
                self._take_first(variables)
            else:
                self._take_means(variables, shares.share)

    def _add_up(
        self, variables: Sequence[Any], befores: Sequence[Any], has_samples: Any
    ) -> None:
        devices = self._replicas.devices
        counts: Sequence[Any] = [True] * len(devices)
        if has_samples is not None:
            counts = has_samples.values
        with tf.device("/cpu:0"):
            before = packing.pack(befores)
            added = tf.add_n(
                [
                    tf.where(count, pack - before, tf.zeros_like(before))
                    for pack, count in zip(
                        self._packs(variables), counts, strict=True
                    )
                ]
            )
            total = before + self._replicas.group.all_reduce(added, "state")
        self._assign(variables, total)

    def _take_first(self, variables: Sequence[Any]) -> None:
        """The chief's first replica has samples whenever one has."""
        with tf.device("/cpu:0"):
            first = packing.pack(_parts(variables, 0))
            group = self._replicas.group
            if group.rank:
                first = tf.zeros_like(first)
            first = group.all_reduce(first, "state")
        self._assign(variables, first)

    def _take_means(self, variables: Sequence[Any], shares: Any) -> None:
        devices = self._replicas.devices
        count = self._replicas.group.size * len(devices)
        dtype = variables[0].dtype
        with tf.device("/cpu:0"):
            weights: Sequence[Any] = [1 / count] * len(devices)
            if shares is not None:
                weights = [share / count for share in shares.values]
            packs = self._packs(variables)
            if dtype.is_floating:
                mean = self._mean_of(packs, weights)
            else:
                exact = [tf.cast(pack, tf.float64) for pack in packs]
                mean = self._mean_of(exact, weights)
                mean = tf.cast(tf.round(mean), dtype)
        self._assign(variables, mean)

    def _packs(self, variables: Sequence[Any]) -> list[Any]:
        """All variables of each replica, in one vector."""
        return [
            packing.pack(_parts(variables, index))
            for index in range(len(self._replicas.devices))
        ]

    def _assign(self, variables: Sequence[Any], pack: Any) -> None:
        """Gives every replica the variables that are in one vector."""
        with tf.device("/cpu:0"):
            values = packing.unpack(pack, _parts(variables, 0))
        for index, device in enumerate(self._replicas.devices):
            with tf.device(device):
                for part, value in zip(
                    _parts(variables, index), values, strict=True
                ):
                    part.assign(value)

    def _mean_of(self, packs: list[Any], weights: Sequence[Any]) -> Any:
        """The weighted mean over the replicas of all workers."""
        if self._replicas.group.size > 1:
            total = tf.add_n(list(map(packing.scale, packs, weights)))
            return self._replicas.group.all_reduce(total, "statistics")
        # Equal values, such as those of a counter, stay exact.
        first, *others = packs
        gaps = [
            packing.scale(pack - first, weight)
            for pack, weight in zip(others, weights[1:], strict=True)
        ]
        return tf.add_n([first, *gaps])


class PythonNumbers:
    """The numbers and strings in attributes of a model, at this moment.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        # Past `__getattr__` and `__setattr__` of Keras.
        self._names = set(vars(model))
        self._values = {
            name: value
            for name, value in vars(model).items()
            if type(value) in _KINDS
        }

    def put_back(self) -> None:
        """Gives the attributes their values of that moment.

        Attributes of Keras, and those that are something else by now, stay as
        they are; a new one is removed where the class has one of its name.
        """
        own = vars(self._model)
        for name in own.keys() - keras_compat.attributes_of_any_model():
            if type(own[name]) not in _KINDS:
                continue
            if name in self._values:
                own[name] = self._values[name]
            elif name not in self._names and self._is_of_class(name):
                del own[name]

    def _is_of_class(self, name: str) -> bool:
        return type(getattr(type(self._model), name, None)) in _KINDS


def synchronized_variables(model: keras.Model) -> frozenset[int]:
    """Identities of the statistics that all replicas update alike."""
    return frozenset(
        keras_compat.identity_of(variable)
        for layer in keras_compat.layers(model)
        if keras_compat.is_synchronized(layer)
        for variable in layer.non_trainable_variables
    )


def read_outside_of_branches(variable: Any) -> tf.Tensor:
    """The value of this replica's part of a variable, before it is assigned.

    It can be used after the step, also if the assignment is in a conditional.
    """
    graph = replica.current().graph
    if graph is None or tf.executing_eagerly():
        return variable.read_value()
    with graph.as_default():
        return variable.read_value()


def _is_number(dtype: tf.DType) -> bool:
    return bool(dtype.is_floating or dtype.is_integer)


def _parts(values: Sequence[Any], index: int) -> list[Any]:
    """Each variable of one local replica."""
    return [value.values[index] for value in values]
