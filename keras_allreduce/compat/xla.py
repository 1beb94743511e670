"""How TensorFlow is told what XLA compiles: attributes of ops in a graph.

`tf.xla.experimental.jit_scope` gives the ops that are made in it `_XlaCompile`
and `_XlaScope`. When the graph is about to run, TensorFlow's clustering joins
marked ops of one scope and one device into programs. No public function changes
the attributes of an op that is there, or lists the kernels of XLA.
"""

import functools
from typing import Any

import tensorflow as tf

# Which ops a device can run; those of XLA have the devices `XLA_CPU_JIT` and
# `XLA_GPU_JIT`.
from tensorflow.python.framework import kernels as _kernels

_COMPILE, _SCOPE = "_XlaCompile", "_XlaScope"
_KEEP = "_grappler_do_not_remove"


def is_marked(op: tf.Operation) -> bool:
    """Whether XLA is to compile an op."""
    return bool(_attribute(op, _COMPILE))


def unmark(op: tf.Operation) -> None:
    """Leaves an op to TensorFlow."""
    op._set_attr(_COMPILE, tf.compat.v1.AttrValue(b=False))


def scope_of(op: tf.Operation) -> str:
    """The scope of an op; empty if it has none."""
    return bytes(_attribute(op, _SCOPE) or b"").decode()


def set_scope(op: tf.Operation, scope: str) -> None:
    """Lets XLA join an op only with others of the same scope."""
    op._set_attr(_SCOPE, tf.compat.v1.AttrValue(s=scope.encode()))


def keep_from_fusing(op: tf.Operation) -> None:
    """Keeps TensorFlow's optimizer from replacing an op by a fused one.

    It fuses matmuls and convolutions with what follows before the clustering
    looks at them, and XLA has no kernels for its fused ops. It leaves alone
    ops that are marked. An op that nobody needs is no longer removed then,
    but by XLA.
    """
    op._set_attr(_KEEP, tf.compat.v1.AttrValue(b=True))


def has_kernel(op: tf.Operation, device_type: str) -> bool:
    """Whether XLA can compile an op, by itself, on a type of device.

    Args:
        op: The op.
        device_type: `"CPU"` or `"GPU"`.
    """
    return any(
        all(_takes(op, name, dtypes) for name, dtypes in constraints)
        for constraints in _kernels_of(op.type, f"XLA_{device_type}_JIT")
    )


def is_moved_to_host(op: tf.Operation) -> bool:
    """Whether TensorFlow puts what an op needs on another device than its own.

    Before it compiles a program, TensorFlow replaces each slice of constant
    size that does not begin at a constant, and computes the new one's size on
    the first CPU device. XLA refuses a program of two CPU devices.
    """
    if op.type != "Slice" or op.inputs[1].op.type == "Const":
        return False
    device = tf.DeviceSpec.from_string(op.device)
    return device.device_type == "CPU" and bool(device.device_index)


def graphs_of_functions(op: tf.Operation) -> list[tf.Graph]:
    """The graphs of the functions that an op calls, as far as they are known.

    Functions that XLA compiles anyway are left out.
    """
    if _attribute(op, "_XlaMustCompile"):
        return []
    graphs = []
    for name in ("f", "then_branch", "else_branch", "cond", "body"):
        called = _attribute(op, name)
        graph = called and _graph_of(op.graph, called.name)
        if graph is not None:
            graphs.append(graph)
    return graphs


def _graph_of(graph: Any, name: str) -> tf.Graph | None:
    # An outer graph has the functions of the graphs in it.
    while graph is not None:
        function = graph._get_function(name)
        found = getattr(function, "graph", None)
        if found is not None:
            return found
        graph = getattr(graph, "outer_graph", None)
    return None


def outer_tensor(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor of an outer graph that a function's graph has captured.

    A tensor that is not captured, or not from a graph, is returned as it is.
    """
    if tensor.op.type == "Placeholder":
        for outer, inner in getattr(tensor.graph, "captures", ()):
            if inner is tensor and tf.is_symbolic_tensor(outer):
                return outer_tensor(outer)
    return tensor


def _takes(op: tf.Operation, name: str, dtypes: frozenset[int]) -> bool:
    value = _attribute(op, name)
    return not isinstance(value, tf.DType) or value.as_datatype_enum in dtypes


@functools.cache
def _kernels_of(
    op_type: str, device: str
) -> list[list[tuple[str, frozenset[int]]]]:
    """The constraints of each kernel: attributes and their dtypes."""
    _register_kernels()
    registered = _kernels.get_registered_kernels_for_op(op_type).kernel
    return [
        [
            (each.name, frozenset(each.allowed_values.list.type))
            for each in kernel.constraint
        ]
        for kernel in registered
        if kernel.device_type == device
    ]


@functools.cache
def _register_kernels() -> None:
    """Lets TensorFlow register XLA's kernels, which it does when asked to."""
    with tf.init_scope(), tf.device("/cpu:0"):
        tf.function(lambda: tf.constant(1.0) + 1.0, jit_compile=True)()


def _attribute(op: tf.Operation, name: str) -> Any:
    try:
        return op.get_attr(name)
    except ValueError:
        return None
