"""Keeps what was measured of a step for as long as Keras runs that step.

Eager steps are not measured again, nor is one that is traced again for other
shapes, which may happen on one worker alone.
"""

import weakref
from typing import Any

import keras

from keras_allreduce.compat import keras_steps
from keras_allreduce.one_device.natures import Natures

_known: weakref.WeakKeyDictionary[keras.Model, dict[str, Any]] = (
    weakref.WeakKeyDictionary()
)


def find(model: keras.Model, step: str) -> Natures | None:
    """What was measured of a step, if it is still the same."""
    references, natures = _known.get(model, {}).get(step, ((), None))
    current = keras_steps.what_a_step_depends_on(model, step)
    if len(references) != len(current) or any(
        reference() is not each
        for reference, each in zip(references, current, strict=True)
    ):
        return None
    return natures


def keep(model: keras.Model, step: str, natures: Natures) -> None:
    """Keeps what was measured of a step."""
    # Only weak references: they refer to the model.
    references = [
        weakref.ref(each)
        for each in keras_steps.what_a_step_depends_on(model, step)
    ]
    _known.setdefault(model, {})[step] = (references, natures)
