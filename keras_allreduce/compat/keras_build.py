"""Builds a model before its first step, under a strategy as on one device.

Only under a strategy does Keras take a first batch before the first step, and
call the model, its metrics and its losses on its shapes, to make all
variables. On one device the first step makes them. A custom `train_step` need
not call the model, nor take the batch apart as Keras does, and on one device it
trains. So what Keras does there is done here: data is read only if nothing else
tells its shapes, and a failure is left to the first step.
"""

import traceback
from typing import Any

import keras

NAME = "_maybe_symbolic_build"
"""The method of Keras that takes a first batch."""


def build(
    model: keras.Model, strategy: Any, epoch_iterator: Any, batch: Any
) -> None:
    """Makes the variables of a model that its first step needs.

    Args:
        model: The model.
        strategy: Its strategy, one of ours.
        epoch_iterator: Keras's iterator over the data; `None` where it has a
            batch.
        batch: The batch then.
    """
    if epoch_iterator is not None:
        dataset = epoch_iterator._get_iterator()
        iteration = getattr(dataset, "iteration", None)
        if iteration is None:  # TensorFlow's own; see `input/dataset.py`.
            batch = next(iter(dataset), ())
        else:
            batch = iteration.first_batch(shapes_only=_is_built(model))
        batch = keras.tree.map_structure(
            lambda leaf: strategy.experimental_local_results(leaf)[0], batch
        )
    with strategy.scope():
        strategy.prepare_model(model, batch)
        try:
            model._symbolic_build(data_batch=batch)
        except Exception as error:
            # It fails on one device too if it is the program's fault.
            if _is_our_own(error):
                raise


def _is_built(model: Any) -> bool:
    try:
        return all(
            part is None or part.built
            for part in (
                *model._flatten_layers(),
                model._compile_metrics,
                model._compile_loss,
            )
        )
    except AttributeError:
        return False


def _is_our_own(error: BaseException | None) -> bool:
    """Whether this package has raised an error, or one that it follows."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if module.startswith("keras_allreduce.") and not module.endswith(
            "keras_build"
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
