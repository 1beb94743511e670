"""Names the remedy where workers write to the same files.

Callbacks of Keras that save, and `Dataset.cache(path)`, take one file or folder
for their own; on a shared file system, and on one machine, each worker needs
another.
"""

import tensorflow as tf

from keras_allreduce.compat import keras_calls

_REMEDY = (
    "All workers must write to files of their own. Received: {what}. Pass one "
    'path per worker, such as `f"{{folder}}/{{strategy.cluster_resolver.'
    'task_id}}"`, or, where a file is only written, pass the callback on the '
    "chief alone."
)


def remedy(error: BaseException) -> str | None:
    """The remedy for an error that a path shared by workers may have caused.

    Args:
        error: The error that ended the script.

    Returns:
        The remedy; `None` if the error is about something else.
    """
    if isinstance(error, tf.errors.AlreadyExistsError):
        what = "AlreadyExistsError, as of a `cache` file that another writes"
        return _REMEDY.format(what=what)
    if isinstance(error, OSError) and keras_calls.is_raised_in_callback(error):
        what = f"{type(error).__name__} in a callback of `fit`"
        return _REMEDY.format(what=what)
    return None
