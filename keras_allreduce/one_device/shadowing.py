"""Other methods for one object, for the time of a block."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


@contextlib.contextmanager
def shadowed(owner: Any, methods: dict[str, Any]) -> Iterator[None]:
    """Gives one object other methods inside the block."""
    # Past __setattr__, in which Keras tracks what is assigned.
    own = vars(owner)
    before = {name: own[name] for name in methods if name in own}
    own.update(
        {
            # Plain Python, also inside a tf.function of the user's.
            name: tf.autograph.experimental.do_not_convert(method)
            for name, method in methods.items()
        }
    )
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)
