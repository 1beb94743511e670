"""Checks the installed TensorFlow and Keras, and names the tested versions.

Package metadata cannot keep an untested version out: TensorFlow is an extra
(`tensorflow`, `tensorflow-cpu` and the nightlies all provide it), and
installers can be told to ignore requirements. So a strategy checks the
imported versions. Loads neither TensorFlow nor Keras when it is imported.
"""

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from keras_allreduce.environment import LEGACY_KERAS

OLDEST = {"TensorFlow": (2, 16), "Keras": (3, 10)}
"""Oldest versions that train right; `make test-versions` runs the tests."""

NEWEST_TESTED = {"TensorFlow": (2, 21), "Keras": (3, 15)}
"""Newest versions that the tests have run with."""

WHY = {
    "TensorFlow": "Older versions bring Keras 2.",
    "Keras": "With older versions the History of several replicas is wrong.",
}

INSTALL = "pip install 'tensorflow>=2.16' 'keras>=3.10'"

# From `check_versions` up to the line that makes a strategy: its `__init__`,
# wrapped by `explained`, calls `_init_options`, and that `check_backend`.
_SCRIPT = 6

_warned: set[str] = set()


def bar_prints_texts(keras: str) -> bool:
    """Whether Keras's progress bar lets a float format itself.

    Before 3.12 it makes a new float of each.

    Args:
        keras: `keras.__version__`.
    """
    return _release(keras) >= (3, 12)


def optimizes_twice_for_nothing(tensorflow: str) -> bool:
    """Whether TensorFlow's second round over a graph leaves its results alone.

    From 2.22 on it changes the last bits of convolutions.

    Args:
        tensorflow: `tf.__version__`.
    """
    return _release(tensorflow) < (2, 22)


def tested(name: str) -> str:
    """Which versions of `"TensorFlow"` or `"Keras"` the tests have run with."""
    oldest, newest = _dotted(OLDEST[name]), _dotted(NEWEST_TESTED[name])
    return f"tested with {oldest} to {newest}"


def check_versions(tensorflow: str, keras: str) -> None:
    """Raises on versions that train wrong; warns once on untested ones.

    Args:
        tensorflow: `tf.__version__`.
        keras: `keras.__version__`.

    Raises:
        RuntimeError: If one is older than `OLDEST`.
    """
    for name, version in (("TensorFlow", tensorflow), ("Keras", keras)):
        release = _release(version)
        if release < OLDEST[name]:
            raise RuntimeError(
                f"keras_allreduce needs {name} {_dotted(OLDEST[name])} or "
                f"later. Received: {name} {version}. {WHY[name]} Run: pip "
                f"install '{name.lower()}>={_dotted(OLDEST[name])}'"
            )
        if release > NEWEST_TESTED[name] and name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"{name} {version} is newer than keras_allreduce is tested "
                f"with ({name} {_dotted(NEWEST_TESTED[name])}). Compare a "
                "short run with one on one device, or upgrade "
                "keras_allreduce.",
                stacklevel=_SCRIPT,
            )


def check_keras_is_not_legacy() -> None:
    """Raises if `tf.keras` is Keras 2.

    Raises:
        RuntimeError: If the environment asks TensorFlow for tf_keras.
    """
    # TensorFlow compares with these three.
    if os.environ.get(LEGACY_KERAS) in ("true", "True", "1"):
        raise RuntimeError(
            _legacy(f"{LEGACY_KERAS}={os.environ[LEGACY_KERAS]}")
        )


def check_model_is_not_legacy(model: Any) -> None:
    """Raises if a model is one of Keras 2.

    Raises:
        RuntimeError: If a class of `model` is of tf_keras.
    """
    for kind in type(model).__mro__:
        if _is_legacy(kind):
            raise RuntimeError(_legacy(f"a model of {kind.__module__}"))


def check_step_is_not_legacy(fn: Callable[..., Any]) -> None:
    """Raises if a function that a strategy runs is a step of Keras 2.

    Raises:
        RuntimeError: If `fn` is of tf_keras.
    """
    if _is_legacy(inspect.unwrap(fn)):
        raise RuntimeError(_legacy("a model of tf_keras in `fit`"))


def explain_import_error(error: ImportError) -> None:
    """Raises a readable error if TensorFlow or Keras is missing or too old.

    Args:
        error: The error of importing a module of this package.

    Raises:
        ImportError: If TensorFlow or Keras is not installed.
        RuntimeError: If one is older than `OLDEST`.
    """
    if error.name in ("tensorflow", "keras"):
        raise ImportError(
            "keras_allreduce needs TensorFlow "
            f"{_dotted(OLDEST['TensorFlow'])} or later and Keras "
            f"{_dotted(OLDEST['Keras'])} or later. Received: no module "
            f"{error.name!r}. Run: {INSTALL}. An installed tensorflow-cpu or "
            "nightly build is used as it is.",
            name=error.name,
        ) from error
    loaded = [sys.modules.get(name) for name in ("tensorflow", "keras")]
    versions = [getattr(module, "__version__", None) for module in loaded]
    if None not in versions:
        check_versions(*map(str, versions))


def _legacy(received: str) -> str:
    return (
        "keras_allreduce trains models of Keras 3; it does not know those of "
        f"tf_keras (Keras 2). Received: {received}. Unset {LEGACY_KERAS} "
        "before TensorFlow is imported, and make the model with `import keras`."
    )


def _is_legacy(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or ""
    return bool(module.partition(".")[0] == "tf_keras")


def _release(version: str) -> tuple[int, int]:
    """`(2, 22)` of `"2.22.0-dev20260905"`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    # A local build may have any name: nothing is known about it.
    return (int(found[1]), int(found[2])) if found else (sys.maxsize, 0)


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
