"""Assumptions about tapes and the graphs of traced functions."""

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import tensorflow as tf

# Whether a thread records for any tape has no public name.
from tensorflow.python import pywrap_tfe as _pywrap_tfe

# Whether an op has an effect beside its outputs is known of its kind; there
# is no public way to ask for a kind by name.
from tensorflow.python.framework import op_def_registry as _op_defs

# The handle data of a captured variable has no public name.
from tensorflow.python.ops import handle_data_util as _handle_data_util

# Ops that have state, but none outside of the variables, random generators
# and values of the graph. Beginnings of their names.
_INSIDE = (
    *("Arg", "Assert", "Assign", "Case", "Collective", "CudnnRNN"),
    *("EmptyTensorList", "If", "LookupTableFind", "LookupTableSize"),
    *("Multinomial", "NcclAllReduce", "NoOp", "ParameterizedTruncatedNormal"),
    *("PartitionedCall", "Placeholder", "Random", "ReadFile", "ReadVariable"),
    *("Resource", "Rng", "Stack", "Stateful", "Stateless", "TensorArray"),
    *("Timestamp", "TruncatedNormal", "VarHandle", "VarIsInitialized"),
    *("VariableShape", "While", "Xla", "_"),
)

# Ops whose result is linear in one of their inputs, where the others do not
# depend on the samples. So a division before them divides what follows.
_LINEAR = frozenset(
    {
        *(
            "AddN",
            "AddV2",
            "Cast",
            "Identity",
            "IdentityN",
            "Mean",
            "Mul",
            "Neg",
        ),
        *("Reshape", "Squeeze", "Sub", "Sum"),
    }
)
# Ops that draw random numbers. Beginnings of their names.
_RANDOM = (
    *("Multinomial", "ParameterizedTruncatedNormal", "Random", "Rng"),
    *("StatefulRandom", "StatefulStandardNormal", "StatefulTruncatedNormal"),
    *("StatefulUniform", "StatelessMultinomial"),
    *("StatelessParameterizedTruncatedNormal", "StatelessRandom"),
    *("StatelessSample", "StatelessShuffle", "StatelessTruncatedNormal"),
    "TruncatedNormal",
)
_READS_OF_DATA = ("IteratorGetNext", "OptionalGetValue", *_RANDOM)
# Ops that leave a value as it is.
_SAME = frozenset({"Cast", "Identity", "Reshape", "Squeeze"})
_REDUCTIONS = frozenset({"Max", "Mean", "Min", "Sum"})
_DIVISIONS = frozenset({"RealDiv", "DivNoNan", "Div"})
_MOST_OPS = 10_000


def denominator(target: Any) -> tf.Tensor | None:
    """The denominator of a value, if it is a ratio.

    Args:
        target: A tensor of a graph, such as a loss.

    Returns:
        The scalar that its numerator is divided by and that no floating
        variable reaches, such as the number of tokens in a batch. `None` if
        there is none, or more than one.
    """
    if not tf.is_tensor(target) or not _is_symbolic(target):
        return None
    found: dict[int, tf.Tensor] = {}
    waiting: list[tf.Tensor] = [target]
    seen: set[Any] = set()
    while waiting:
        tensor = waiting.pop()
        op = tensor.op
        if op in seen or len(seen) > _MOST_OPS:
            continue
        seen.add(op)
        if op.type in _DIVISIONS and _may_divide(op.inputs[1]):
            found[id(op.inputs[1])] = op.inputs[1]
        elif op.type in _LINEAR or op.type in _DIVISIONS:
            waiting.extend(op.inputs)
    (only,) = found.values() if len(found) == 1 else (None,)
    return only


def last_reduction(value: Any) -> str:
    """The op that a value ends in: "Max", "Mean", "Min" or "Sum".

    Empty if it ends in none of them. "Mean" too if it does not depend on the
    data: it is the same on any part of a batch.
    """
    if not tf.is_tensor(value) or not _is_symbolic(value):
        return ""
    if not _depends_on_data(value):
        return "Mean"
    op = _before(value.op, _SAME)
    if op.type in _REDUCTIONS:
        inner = _before(op.inputs[0].op, _SAME).type
        return "" if inner in _REDUCTIONS - {op.type} else str(op.type)
    return ""


def _before(op: Any, passed: Container[str]) -> Any:
    """The op that the first inputs of some kinds of ops lead to."""
    while op.type in passed:
        op = op.inputs[0].op
    return op


def depends_on(value: Any, others: Iterable[Any]) -> bool:
    """Whether a value of a graph is computed from one of some others."""
    if not tf.is_tensor(value) or not _is_symbolic(value):
        return False
    ops = {each.op for each in others if tf.is_tensor(each)}
    return any(op in ops for op in _ancestors(value))


def terms(target: Any) -> list[tf.Tensor]:
    """The scalars that a target is linear in, itself among them.

    Those that depend on the data: a penalty of the weights is not one.
    """
    found: dict[int, tf.Tensor] = {}
    waiting = [target] if tf.is_tensor(target) else []
    while waiting and len(found) < _MOST_OPS:
        tensor = waiting.pop()
        if id(tensor) in found or tensor.shape.rank != 0:
            continue
        if not _is_symbolic(tensor):
            return [tensor]
        if _depends_on_data(tensor):
            found[id(tensor)] = tensor
            if tensor.op.type in _LINEAR:
                waiting.extend(tensor.op.inputs)
    return list(found.values())


def _depends_on_data(tensor: tf.Tensor) -> bool:
    """Whether a tensor follows from more than constants and variables."""
    return any(map(_is_data, _ancestors(tensor, through_shapes=True)))


def _may_divide(tensor: tf.Tensor) -> bool:
    """Whether a tensor is a scalar that depends on data, not on variables."""
    if tensor.shape.rank != 0 or not tensor.dtype.is_floating:
        return False
    ops = list(_ancestors(tensor))
    reads_variables = any(
        op.type in ("ReadVariableOp", "ResourceGather")
        and op.outputs[0].dtype.is_floating
        for op in ops
    )
    return not reads_variables and any(map(_is_data, ops))


def _is_data(op: Any) -> bool:
    """Whether an op reads a batch or draws random numbers."""
    if op.type == "Placeholder":
        return op.outputs[0].dtype not in (tf.resource, tf.variant)
    return bool(op.type.startswith(_READS_OF_DATA))


def _ancestors(
    tensor: tf.Tensor, *, through_shapes: bool = False
) -> Iterator[Any]:
    waiting, seen = [tensor.op], set()
    while waiting:
        op = waiting.pop()
        if op not in seen:
            seen.add(op)
            yield op
            # As many samples as there are.
            if op.type != "Shape" or through_shapes:
                waiting.extend(each.op for each in op.inputs)


def _is_symbolic(tensor: Any) -> bool:
    return hasattr(tensor, "graph") and not tf.executing_eagerly()


def of_thread() -> Any:
    """The graph that this thread traces into; `None` if it traces none."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()


def is_in_vectorized_map() -> bool:
    """Whether the thread traces what `tf.vectorized_map` maps.

    `tf.GradientTape.jacobian` too.
    """
    if tf.executing_eagerly():
        return False
    # TensorFlow traces the body into the graph around it, under this name.
    return "loop_body" in tf.get_current_name_scope().split("/")


def is_random(traced: Any) -> bool:
    """Whether a concrete function draws random numbers.

    Two runs may draw the same ones: their results do not tell.
    """
    definition = traced.graph.as_graph_def()
    nodes = [
        *definition.node,
        *(
            node
            for function in definition.library.function
            for node in function.node_def
        ),
    ]
    return any(node.op.startswith(_RANDOM) for node in nodes)


def without_outside_effects(traced: Any) -> Callable[..., list[tf.Tensor]]:
    """A traced function without effects outside of its graph.

    Args:
        traced: A concrete function that returns a list of tensors.

    Returns:
        A function of the same arguments, without the ops that print, write,
        call Python, or change tables, queues and iterators.

    Raises:
        ValueError: If a result depends on such an op.
    """
    definition = traced.graph.as_graph_def()
    effects = _nodes_with_effect(definition)
    return _pruned(traced, definition, effects) if effects else traced


def _nodes_with_effect(definition: Any) -> dict[str, str]:
    """Name and op of each node whose effect is noticed outside of a graph."""
    functions: set[str] = set()
    while True:  # A function may call others.
        found = {
            function.signature.name
            for function in definition.library.function
            if any(_has_effect(node, functions) for node in function.node_def)
        }
        if found == functions:
            break
        functions = found
    return {
        node.name: node.op
        for node in definition.node
        if _has_effect(node, functions)
    }


def _has_effect(node: Any, functions: set[str]) -> bool:
    """Whether a node has an effect itself, or calls a function that has."""
    for attribute in node.attr.values():
        if attribute.func.name in functions or any(
            each.name in functions for each in attribute.list.func
        ):
            return True
    if node.op.startswith(_INSIDE):
        return False
    definition = _op_defs.get(node.op)
    return definition is not None and (
        definition.is_stateful
        or any(arg.type == _RESOURCE for arg in definition.input_arg)
    )


_RESOURCE = tf.resource.as_datatype_enum


def _pruned(
    traced: Any, definition: Any, effects: dict[str, str]
) -> Callable[..., list[tf.Tensor]]:
    """A function without some nodes, and without what depends on them."""
    lost = set(effects)
    for node in definition.node:  # In the order in which they were made.
        inputs = {_node_of(each) for each in node.input if each[:1] != "^"}
        if inputs & lost:
            lost.add(node.name)
    outputs = [each.name for each in traced.graph.outputs]
    if lost & set(map(_node_of, outputs)):
        kinds = ", ".join(sorted(set(effects.values())))
        raise ValueError(
            "the step uses what is read or made outside of its graph, which "
            f"a measurement would change ({kinds})"
        )
    wanted = {op.name for op in traced.graph.control_outputs} - lost
    needed = _with_ancestors(
        definition, wanted | set(map(_node_of, outputs)), lost
    )
    names = {node.name for node in needed.node}
    internal = {id(own): other for other, own in traced.graph.captures}

    def run(*arguments: Any) -> list[tf.Tensor]:
        graph: Any = tf.compat.v1.get_default_graph()
        flat = iter(tf.nest.flatten(arguments, expand_composites=True))
        inputs = {}
        for placeholder in traced.graph.inputs:
            outer = internal.get(id(placeholder))
            value = next(flat) if outer is None else graph.capture(outer)
            if placeholder.op.name in names:
                inputs[placeholder.name] = value
        found = tf.graph_util.import_graph_def(
            needed, input_map=inputs, return_elements=outputs, name=""
        )
        return list(found)

    return tf.function(run, autograph=False)


def _with_ancestors(definition: Any, wanted: set[str], lost: set[str]) -> Any:
    """The part of a graph that some of its nodes need, without the lost."""
    needed = type(definition)()
    needed.library.CopyFrom(definition.library)
    needed.versions.CopyFrom(definition.versions)
    nodes = {node.name: node for node in definition.node}
    waiting, names = list(wanted), set()
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += set(map(_node_of, nodes[name].input)) - lost
    for node in definition.node:
        if node.name not in names:
            continue
        inputs = [each for each in node.input if _node_of(each) not in lost]
        added = needed.node.add()
        added.CopyFrom(node)
        del added.input[:]
        added.input.extend(inputs)
    return needed


def _node_of(name: str) -> str:
    """Name of the node of a tensor or of a control input."""
    return name.lstrip("^").split(":")[0]


def is_recorded() -> bool:
    """Whether a tape records what happens in this thread."""
    return not _pywrap_tfe.TFE_Py_TapeSetIsEmpty()


def is_recorded_by_another(tape: tf.GradientTape) -> bool:
    """Whether other tapes record what happens in this thread.

    They do where gradients are themselves differentiated.
    """
    if not tape._recording:
        return is_recorded()
    with tape.stop_recording():
        return is_recorded()


def captured_variables(
    concrete: Any,
) -> Iterator[tuple[tf.Tensor, tf.DType]]:
    """Handle and dtype of all variables that a concrete function uses.

    `concrete.variables` leaves out those that it only assigns.
    """
    for captured in concrete.captured_inputs:
        if captured.dtype != tf.resource:
            continue
        data = _handle_data_util.get_handle_data(captured)
        if data is not None and data.is_set and data.shape_and_type:
            dtype = tf.as_dtype(data.shape_and_type[0].dtype)
            if dtype not in (tf.variant, tf.resource):
                yield captured, dtype
