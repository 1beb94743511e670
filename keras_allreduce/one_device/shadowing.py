"""Temporarily replaces methods of one object."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_do_not_convert = tf.autograph.experimental.do_not_convert


@contextlib.contextmanager
def shadowed(owner: Any, methods: dict[str, Any]) -> Iterator[None]:
    """Replaces methods of one object inside the block."""
    # Past __setattr__, in which Keras tracks assignments.
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    # Plain Python, also inside a tf.function of the user's.
    own.update({name: _do_not_convert(methods[name]) for name in methods})
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
