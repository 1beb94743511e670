"""Distributed variables that behave more as on one device.

`float(optimizer.learning_rate)` and `int(optimizer.iterations)` work:
TensorFlow's variables have `__float__` and `__int__`, its distributed ones
have not. And the value that a metric is reset to is not read: TensorFlow sums
each variable over all workers then, one by one, for a result that Keras drops.
A variable that a replica assigns on its own differs between the replicas from
then on, so the strategy is told. Values that replicas assign to a variable with
an aggregation count by samples. A tape outside of `strategy.run` is an error
that says so.
"""

from typing import Any

import tensorflow as tf

# Whether `assign` is that of one replica, within an update of all.
from tensorflow.python.distribute import values_util as _values_util

# The distributed variables of a strategy. There is no public way to make them
# of another class.
from tensorflow.python.distribute.values import (
    MirroredVariable,
    SyncOnReadVariable,
)

# The class of variables that no strategy has made. There is no public one that
# has the methods.
from tensorflow.python.ops.resource_variable_ops import (
    ResourceVariable as _ResourceVariable,
)

PlainVariable = _ResourceVariable


class _Numbers:
    """`float` and `int` of a variable with one number."""

    numpy: Any

    def __float__(self) -> float:
        return float(self.numpy())

    def __int__(self) -> int:
        return int(self.numpy())


OUTSIDE_OF_A_REPLICA = (
    "Gradients of the variables of a strategy are taken and applied on its "
    "replicas. Received: a gradient or an update outside of "
    "`strategy.run`. Put the tape and the optimizer into a function, and call "
    "`strategy.run(function, args=(batch,))` inside the scope of the "
    "strategy, or train with `model.fit`."
)


class _TellsOfAssignments(_Numbers):
    """Tells its strategy before a replica assigns to its own part."""

    aggregation: tf.VariableAggregation
    distribute_strategy: Any
    _get_on_device_or_primary: Any

    @property
    def handle(self) -> Any:
        """That of this replica's part, which a tape asks for."""
        stock: Any = super()
        try:
            return stock.handle
        except ValueError as error:
            raise ValueError(OUTSIDE_OF_A_REPLICA) from error

    def _update_replica(self, update_fn: Any, value: Any, **kwargs: Any) -> Any:
        extended = self.distribute_strategy.extended
        value = extended.before_assignment(self, value)
        stock: Any = super()
        # With an aggregation TensorFlow gives all replicas one value, in a
        # merge_call unless each has the same already.
        if extended.assigns_own_part():
            own = stock._get_on_device_or_primary()
            return update_fn(own, value, **kwargs)
        return stock._update_replica(update_fn, value, **kwargs)


class _NotReadAfterAssign(_Numbers):
    """`assign` outside of a replica returns the variable, not its value.

    Not in a graph of a session, which runs what `assign` returns.
    """

    def assign(
        self,
        value: Any,
        use_locking: bool = False,
        name: str | None = None,
        read_value: bool = True,
    ) -> Any:
        stock: Any = super()
        if (
            read_value
            and _is_cross_replica()
            # In a graph of TensorFlow 1 what `assign` returns is what runs.
            and tf.compat.v1.executing_eagerly_outside_functions()
        ):
            stock.assign(value, use_locking, name, read_value=False)
            return self
        return stock.assign(value, use_locking, name, read_value)


def _is_cross_replica() -> bool:
    if _values_util.in_replica_update_context():
        return False
    # Outside of its scope a variable enters it.
    return not tf.distribute.has_strategy() or (
        tf.distribute.in_cross_replica_context()
    )


# With their names, which `repr` shows.
_OWN_CLASSES = {
    stock: type(stock.__name__, (mixin, stock), {})
    for stock, mixin in (
        (MirroredVariable, _TellsOfAssignments),
        (SyncOnReadVariable, _NotReadAfterAssign),
    )
}


def is_made_outside_of_scope(variable: Any) -> bool:
    """Whether a plain variable is not the part of a replica of another one.

    Of one whose handle is in a graph nothing is known.
    """
    handle = variable.handle
    return hasattr(handle, "numpy") and not hasattr(
        handle, "_distributed_container"
    )


def convert_in_place(variable: Any) -> Any:
    """Makes a distributed variable behave so.

    Args:
        variable: Variable that TensorFlow has made; others stay as they are.
    """
    own_class = _OWN_CLASSES.get(type(variable))
    if own_class is not None:
        variable.__class__ = own_class
    return variable
