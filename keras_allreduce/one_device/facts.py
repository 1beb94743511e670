"""All that is known of a model beside the model itself, in one place.

A model is referred to only weakly, and goes when the program lets
go of it, with all that was known of it.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_allreduce.compat import keras as keras_compat
from keras_allreduce.one_device.reduction import Reductions


@dataclass
class ModelFacts:
    """Facts of a model that were found so far.

    Attributes:
        samples: The first samples of a batch that Keras has shown, if any.
        warned: Which warnings the model has had.
        metrics: How the state of each custom metric is reduced, by variable.
    """

    samples: Any = None
    warned: set[str] = field(default_factory=set)
    metrics: weakref.WeakKeyDictionary[Any, list[str]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _steps: dict[str, tuple[list[Any], Reductions]] = field(
        default_factory=dict
    )

    def reductions(self, model: keras.Model, step: str) -> Reductions | None:
        """The measurement of a step, if it is still the same.

        Eager steps are not measured again, nor is one that is traced again for
        other shapes, which may happen on one worker alone.
        """
        references, reductions = self._steps.get(step, ([], None))
        current = keras_compat.what_a_step_depends_on(model, step)
        if len(references) != len(current) or any(
            reference() is not each
            for reference, each in zip(references, current, strict=True)
        ):
            return None
        return reductions

    def keep(
        self, model: keras.Model, step: str, reductions: Reductions
    ) -> None:
        """Keeps the measurement of a step for as long as Keras runs it."""
        # Only weak references: they refer to the model.
        references = [
            weakref.ref(each)
            for each in keras_compat.what_a_step_depends_on(model, step)
        ]
        self._steps[step] = references, reductions


_facts: weakref.WeakKeyDictionary[keras.Model, ModelFacts] = (
    weakref.WeakKeyDictionary()
)


def of(model: keras.Model) -> ModelFacts:
    """The known facts of a model."""
    return _facts.setdefault(model, ModelFacts())
