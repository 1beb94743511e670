"""Marks what XLA compiles in a traced step: ops that the replicas make.

No function is compiled. Ops of replicas are marked while they are traced, and
TensorFlow joins marked ops of one device and one scope into programs
(clusters). Sums over replicas are made outside of replicas, and stay outside.

One program would hand out all gradients at once, so that nothing of the
all-reduce were hidden. So a program ends where gradients that travel together
are ready, as PyTorch does under `torch.compile` (`DDPOptimizer`):

    replica 0   |-- forward, last layers --|-- part 1 --|-- part 2 --|
    packs                                  |==== 0 ====||==== 1 ===| |= 2 =|
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorflow as tf

from keras_allreduce.compat import xla

SMALLEST = 5
"""Ops below which a program costs more than it gains, without a matmul."""

# In the collections of a graph whose replicas are marked, and of the graphs of
# the functions in it.
_KEY = "keras_allreduce_xla"

# Not a replica's computation: clocks, and ops that leave the device.
_NEVER = ("Timestamp", "Collective", "Nccl")

# XLA pads tensors of a shape that values decide. Tensors computed from the row
# splits of a ragged one no longer fit them.
_SHAPED_BY_VALUES = ("Where", "Unique")

# Ops that cost nothing.
_TRIVIAL = frozenset(
    (
        "BroadcastGradientArgs",
        "Const",
        "Identity",
        "IdentityN",
        "NoOp",
        "Placeholder",
        "PreventGradient",
        "ReadVariableOp",
        "Shape",
        "StopGradient",
    )
)

# Ops that TensorFlow replaces by the ops of their functions, which have no
# marks, before the clustering looks.
_CALLS = frozenset(
    (
        "Case",
        "If",
        "PartitionedCall",
        "StatefulPartitionedCall",
        "StatelessCase",
        "StatelessIf",
        "StatelessWhile",
        "While",
    )
)

# TensorFlow's optimizer fuses these with the ops around them.
_HEAVY = ("MatMul", "BatchMatMul", "Conv", "DepthwiseConv", "FusedBatchNorm")
_FUSED_TOO = frozenset(("Sigmoid", "Softplus"))


@dataclass
class Coverage:
    """The share of the replicas' ops that XLA can compile.

    Attributes:
        compiled: Number of ops in it, by type.
        outside: Number of ops that are left to TensorFlow, by type.
    """

    compiled: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the ops that are compiled; 1 if there are none."""
        compiled, outside = self.compiled.total(), self.outside.total()
        return compiled / (compiled + outside) if compiled + outside else 1.0


@contextlib.contextmanager
def marking() -> Iterator[Coverage]:
    """Marks the ops of replicas that are traced in the block for XLA.

    Yields:
        A coverage, to be read after the block.
    """
    graph = tf.compat.v1.get_default_graph()
    first = len(graph.get_operations())
    coverage = Coverage()
    marked = tf.compat.v1.get_collection_ref(_KEY)
    marked.append(coverage)
    try:
        with tf.xla.experimental.jit_scope(compile_ops=_is_of_a_replica):
            yield coverage
    finally:
        marked.remove(coverage)
    _tidy(graph.get_operations()[first:], coverage)


def is_marking() -> bool:
    """Whether this thread traces ops of replicas for XLA."""
    return not tf.executing_eagerly() and bool(
        tf.compat.v1.get_collection(_KEY)
    )


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Leaves ops made in the block unmarked."""
    with tf.xla.experimental.jit_scope(compile_ops=False):
        yield


def is_worth_a_program(graph: tf.Graph, device: str, parts: int) -> bool:
    """Whether XLA can compile the graph of a function, and saves time by it.

    Args:
        graph: The graph, with the functions that its ops call.
        device: Name of the device that is to run it.
        parts: Number of parts of it that have nothing to do with each other.
            On a CPU each must have `SMALLEST` ops; on a GPU a program saves
            the launches of all.
    """
    kind = _kind_of(device)
    ops = list(_all_ops(graph))
    return (kind != "CPU" or len(_computing(ops)) >= SMALLEST * parts) and all(
        op.type in _TRIVIAL or xla.has_kernel(op, kind) for op in ops
    )


def cut(parts: Sequence[Sequence[Any]]) -> None:
    """Ends a program of one replica where each part of its gradients is ready.

    Walks back from the gradients of the first part, then from those of the
    next, and gives every marked op on the way that is in no part yet the scope
    of the part. The forward pass is in the first: nothing leaves before it. A
    gradient that costs little, as that of a bias, is computed where what it is
    computed from is.

    Args:
        parts: Gradients, dense or sparse, in the order in which backprop
            finishes them.
    """
    name = f"{_KEY}_{_next_number()}_"
    part_of: dict[tf.Operation, int] = {}
    for part, gradients in enumerate(parts):
        flat = tf.nest.flatten(list(gradients), expand_composites=True)
        ends = [xla.outer_tensor(tensor).op for tensor in flat]
        for end in ends:
            inputs = [xla.outer_tensor(tensor).op for tensor in end.inputs]
            if all(op in part_of for op in inputs) and not _is_heavy(end):
                part_of[end] = max((part_of[op] for op in inputs), default=part)
        found = ends
        while found:
            op = found.pop()
            if op in part_of or xla.scope_of(op).startswith(_KEY):
                continue
            part_of[op] = part
            found += [xla.outer_tensor(tensor).op for tensor in op.inputs]
            found += op.control_inputs
    for op, part in part_of.items():
        if xla.is_marked(op):
            xla.set_scope(op, f"{name}{part}")


def _next_number() -> int:
    numbers = tf.compat.v1.get_collection_ref(f"{_KEY}_numbers")
    numbers.append(len(numbers))
    return len(numbers) - 1


def _is_of_a_replica(node: Any) -> bool:
    return not node.op.startswith(_NEVER) and (
        tf.distribute.get_replica_context() is not None
    )


def _is_heavy(op: tf.Operation) -> bool:
    return op.type.startswith(_HEAVY)


def _kind_of(device: str) -> str:
    return tf.DeviceSpec.from_string(device).device_type or "CPU"


def _all_ops(graph: tf.Graph) -> Iterator[tf.Operation]:
    """The ops of a graph and of all functions that they call."""
    for op in graph.get_operations():
        yield op
        for called in xla.graphs_of_functions(op):
            yield from _all_ops(called)


def _tidy(ops: Sequence[tf.Operation], coverage: Coverage) -> None:
    """Takes the marks off what XLA cannot compile, and off small islands."""
    marked = []
    for op in filter(xla.is_marked, ops):
        if op.type in _CALLS:
            xla.unmark(op)
            for graph in xla.graphs_of_functions(op):
                coverage.outside.update(_computing(_all_ops(graph)))
        elif (
            xla.has_kernel(op, _kind_of(op.device))
            and not op.type.startswith(_SHAPED_BY_VALUES)
            and not xla.is_moved_to_host(op)
        ):
            marked.append(op)
        else:
            xla.unmark(op)
            coverage.outside.update(_computing([op]))
    kept: set[tf.Operation] = set()
    for island in _connected(marked):
        types = _computing(island)
        if len(types) >= SMALLEST or any(map(_is_heavy, island)):
            kept.update(island)
            coverage.compiled.update(types)
    for op in marked:
        needed = op.type == "Const" and any(
            user in kept for output in op.outputs for user in output.consumers()
        )
        if op not in kept and not needed:
            xla.unmark(op)
        elif _is_heavy(op) or op.type in _FUSED_TOO:
            xla.keep_from_fusing(op)


def _computing(ops: Iterable[tf.Operation]) -> list[str]:
    """The types of ops that compute something."""
    return [
        op.type
        for op in ops
        if op.type not in _TRIVIAL and op.type not in _CALLS
    ]


def _connected(ops: Sequence[tf.Operation]) -> list[list[tf.Operation]]:
    """Ops by the programs that they can be in: of one device and one scope."""
    # A constant connects nothing: each program gets its own.
    place = {
        op: (op.device, xla.scope_of(op)) for op in ops if op.type != "Const"
    }
    root = {op: op for op in place}

    def root_of(op: tf.Operation) -> tf.Operation:
        while root[op] is not op:
            root[op] = root[root[op]]
            op = root[op]
        return op

    for op in place:
        for tensor in op.inputs:
            if place.get(tensor.op) == place[op]:
                root[root_of(op)] = root_of(tensor.op)
    islands: dict[tf.Operation, list[tf.Operation]] = {}
    for op in place:
        islands.setdefault(root_of(op), []).append(op)
    return list(islands.values())
