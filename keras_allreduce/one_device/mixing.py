"""Reads in the graph whether a forward pass mixes the samples of a batch.

From the inputs to the outputs each tensor gets a label. Ops that are not known
make no claim, so that every finding mixes samples for sure:

    ROWS      row i depends on sample i alone
    COLUMNS   a matrix of rows, transposed
    UNKNOWN   depends on samples; on which is not known
    MIXED     depends on several samples, whatever its shape

    x ROWS --> mean of axis 0, a scalar, a product of rows and rows --> MIXED
           --> ops by element, or along other axes --> ROWS
           --> another op                                           --> UNKNOWN
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf

ROWS, COLUMNS, UNKNOWN, MIXED = "rows", "columns", "unknown", "mixed"

_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
_REDUCTIONS = {"Mean", "Sum", "Max", "Min", "Prod", "EuclideanNorm"}
_ELEMENT_BY_ELEMENT = {
    *("Add", "AddV2", "AddN", "Sub", "Mul", "RealDiv", "DivNoNan", "MulNoNan"),
    *("Div", "Pow", "Maximum", "Minimum", "SquaredDifference", "SelectV2"),
    *("Cast", "Identity", "StopGradient", "Neg", "Abs", "Square", "Sqrt"),
    *("Rsqrt", "Exp", "Log", "Log1p", "Tanh", "Sigmoid", "Relu", "Relu6"),
    *("Elu", "Selu", "LeakyRelu", "Softplus", "Softsign", "Erf", "Sin", "Cos"),
    *("Reciprocal", "Sign", "ClipByValue"),
}
# The first input has the rows; the others are weights.
_OF_EACH_ROW = {
    *("MatMul", "BiasAdd", "Conv1D", "Conv2D", "Conv3D", "MaxPool", "AvgPool"),
    *("DepthwiseConv2dNative", "BatchMatMulV2", "Softmax", "LogSoftmax"),
}
_OF_ANOTHER_REPLICA = re.compile(r"(^|/)replica_\d+/")


def find(
    inputs: Iterable[Any],
    outputs: Iterable[Any],
    keeps_rows: Callable[[str], bool],
) -> str | None:
    """The name of the op that mixes the samples that outputs depend on.

    Args:
        inputs: Tensors of a graph, samples first.
        outputs: Tensors that were computed from them.
        keeps_rows: Whether the op of a name is known not to mix samples, or
            to mix them as it should.

    Returns:
        The name of the first op, or `None` if none is sure to. Nor is one
        found if the outputs depend on other replicas: then the model
        exchanges the values it needs itself.
    """
    labels: dict[str, str] = {
        each.name: ROWS for each in inputs if each.shape.rank != 0
    }
    origins: dict[str, str] = {}
    for op in _in_order(outputs, set(labels)):
        if _OF_ANOTHER_REPLICA.search(op.name) or "Collective" in op.type:
            return None
        given = [labels.get(each.name) for each in op.inputs]
        if op.type in _SHAPES or not any(given):
            continue
        mixed = [
            each.name for each in op.inputs if labels.get(each.name) == MIXED
        ]
        for output in op.outputs:
            label = MIXED if mixed else _label(op, given, output, keeps_rows)
            if not output.dtype.is_floating and output.shape.rank == 0:
                label = None  # The length of the longest, say.
            elif label == MIXED and not output.dtype.is_floating:
                label = UNKNOWN
            if label is not None:
                labels[output.name] = label
            if label == MIXED:
                origins[output.name] = origins[mixed[0]] if mixed else op.name
    found = [origins.get(each.name) for each in outputs]
    return next((name for name in found if name is not None), None)


def _in_order(
    outputs: Iterable[Any], known: set[str]
) -> Iterator[tf.Operation]:
    """The ops that outputs depend on, each after those of its inputs."""
    seen: set[str] = set()
    stack = [(each.op, False) for each in outputs if each.name not in known]
    while stack:
        op, is_ready = stack.pop()
        if is_ready:
            yield op
            continue
        if op.name in seen:
            continue
        seen.add(op.name)
        stack.append((op, True))
        stack += [
            (each.op, False) for each in op.inputs if each.name not in known
        ]


def _label(
    op: tf.Operation,
    given: list[str | None],
    output: Any,
    keeps_rows: Callable[[str], bool],
) -> str | None:
    """The label of an output; its op has a label among its inputs."""
    rank = output.shape.rank
    if keeps_rows(op.name):
        return ROWS if rank else None
    if rank == 0:
        return MIXED
    if op.type == "MatMul" and given in ([ROWS, ROWS], [ROWS, COLUMNS]):
        return MIXED
    if rank is None or any(each not in (None, ROWS) for each in given):
        return UNKNOWN
    if op.type in _REDUCTIONS:
        return _label_of_reduction(op)
    if op.type in _ELEMENT_BY_ELEMENT:
        ranks = {
            each.shape.rank
            for each, label in zip(op.inputs, given, strict=True)
            if label == ROWS
        }
        return ROWS if ranks == {rank} else UNKNOWN
    if op.type == "Transpose" and rank == 2:
        order = tf.get_static_value(op.inputs[1])
        if order is not None and list(order) == [1, 0]:
            return COLUMNS
    if op.type == "BatchMatMulV2" and given == [ROWS, ROWS] and rank > 2:
        return ROWS
    if op.type in _OF_EACH_ROW:
        is_first = given[0] == ROWS and not any(given[1:])
        transposed = op.type == "MatMul" and op.get_attr("transpose_a")
        return ROWS if is_first and not transposed and rank > 1 else UNKNOWN
    return ROWS if _keeps_the_first_axis(op, output) else UNKNOWN


def _label_of_reduction(op: tf.Operation) -> str:
    rank = op.inputs[0].shape.rank
    axes = tf.get_static_value(op.inputs[1])
    if axes is None or not rank:
        return UNKNOWN
    return MIXED if 0 in {int(axis) % rank for axis in axes.flat} else ROWS


def _keeps_the_first_axis(op: tf.Operation, output: Any) -> bool:
    """Whether an op moves elements, and those of a sample stay in its row."""
    if op.type == "Reshape":
        return bool(output.shape[0] is None and op.inputs[0].shape[0] is None)
    if op.type == "Pack":
        return bool(op.get_attr("axis") % output.shape.rank != 0)
    if op.type == "StridedSlice":
        whole = op.get_attr("begin_mask") & op.get_attr("end_mask") & 1
        names = ("shrink_axis_mask", "new_axis_mask", "ellipsis_mask")
        return bool(whole and not any(op.get_attr(n) & 1 for n in names))
    if op.type in ("ConcatV2", "ExpandDims"):
        axis = tf.get_static_value(op.inputs[-1])
        return axis is not None and int(axis) % output.shape.rank != 0
    if op.type == "Transpose":
        order = tf.get_static_value(op.inputs[1])
        return order is not None and int(order[0]) == 0
    if op.type == "Squeeze":
        rank = op.inputs[0].shape.rank
        axes = op.get_attr("squeeze_dims")
        return bool(rank and axes and all(axis % rank for axis in axes))
    # Rows of a table, by the numbers in the rows.
    return op.type in ("ResourceGather", "GatherV2")
