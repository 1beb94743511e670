"""Private names of `tf.function`: how it is optimized, and called anew.

The graph of a step has the ops of all replicas, and its optimizer, Grappler,
makes about 20 passes over it. On CPUs some take a fifth of the time of a first
step and change next to nothing:

    layout             changes the layout of images on GPUs only
    memory_optimizer   swaps to the host, for GPUs only
    the second round   removes up to 3 ops in 1000 (benchmarks/models.py);
                         until TensorFlow 2.21, as later ones round otherwise

Public functions set other options of Grappler, for the whole process, and none
sets these for some functions. Options of the user stay.

A traced function always reads and writes the variables that it was traced with.
It gets their handles as arguments, though, so it can be called with others.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

# The options with which a thread calls functions, and their class.
from tensorflow.python.eager import context as _context

from keras_allreduce.compat import versions
from keras_allreduce.devices import is_gpu


def is_brief_on(devices: Sequence[str]) -> bool:
    """Whether the passes above change nothing on devices: they are CPUs."""
    return not any(map(is_gpu, devices))


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """Leaves those passes out for functions that this thread calls first."""
    context = _context.context()
    options = context.function_call_options
    config = options.config_proto_serialized
    # A copy, as TensorFlow's `function_executor_type` changes the object.
    changed = copy.copy(_brief(options.executor_type, config))
    context.function_call_options = changed
    try:
        yield
    finally:
        # Options that were set in the block stay.
        now = context.function_call_options.config_proto_serialized
        if now == changed.config_proto_serialized:
            context.function_call_options = options


@functools.lru_cache(maxsize=8)
def _brief(
    executor_type: str | None, config: bytes
) -> _context.FunctionCallOptions:
    proto = tf.compat.v1.ConfigProto.FromString(config)
    options = proto.graph_options.rewrite_options
    changes = [
        ("layout_optimizer", options.DEFAULT, options.OFF),
        (
            "memory_optimization",
            options.DEFAULT_MEM_OPT,
            options.NO_MEM_OPT,
        ),
    ]
    if versions.optimizes_twice_for_nothing(tf.__version__):
        rounds = (options.DEFAULT_NUM_ITERS, options.ONE)
        changes.append(("meta_optimizer_iterations", *rounds))
    for name, default, changed in changes:
        if getattr(options, name) == default:
            setattr(options, name, changed)
    return _context.FunctionCallOptions(executor_type, proto)


def traced_anywhere(
    function: Callable[..., Any],
    tensors: Sequence[tf.Tensor],
    *,
    jit_compile: bool | None = None,
) -> Any:
    """Traces a function whose ops run on the device that calls it.

    Args:
        function: Called with symbolic tensors like `tensors`.
        tensors: The arguments of its first call.
        jit_compile: As for `tf.function`.

    Returns:
        The traced function. Its `captured_inputs` are further arguments, such
        as the handles of variables.
    """

    @functools.wraps(function)
    def on_no_device(*symbolic: tf.Tensor) -> Any:
        # Ops that name a device would stay there. A function of an op's
        # device has the last word, and only the older `device` takes one.
        with tf.compat.v1.device(_no_device):
            return function(*symbolic)

    traced = tf.function(on_no_device, autograph=False, jit_compile=jit_compile)
    return traced.get_concrete_function(*tensors)


def _no_device(_op: tf.Operation) -> str:
    return ""


def call(
    traced: Any, tensors: Sequence[tf.Tensor], captures: Sequence[tf.Tensor]
) -> Any:
    """Calls a traced function with other captures than those of its trace."""
    return traced._call_flat(list(tensors), list(captures))
