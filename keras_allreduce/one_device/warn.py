"""Warns, once for each model, of what cannot be as on one device."""

import warnings
import weakref

import keras

from keras_allreduce.one_device import whole_batch
from keras_allreduce.one_device.nature import SUM
from keras_allreduce.one_device.natures import Natures
from keras_allreduce.reduce.plan import size_of

_warned: weakref.WeakSet[keras.Model] = weakref.WeakSet()


def of_natures(
    model: keras.Model, natures: Natures, *, is_custom: bool
) -> None:
    """Warns of what was not measured, or is neither a mean nor a sum."""
    if natures.failure:
        _once(
            model,
            "Whether the loss of a custom step, or what a step keeps, is a "
            "mean or a sum over samples is measured on a few samples, which "
            f"failed: {natures.failure}. It is taken for a mean. Pass "
            "weigh_samples=True to the strategy to say so, or False if the "
            "loss is a sum.",
        )
        return
    losses = [
        nature
        for key, nature in natures.found.items()
        if key[0] in ("loss", "added")
    ]
    # What Keras adds up may mix means and sums, each of which is right.
    mixes = not is_custom and any(each.kind == SUM for each in losses)
    kinds = ("loss", "added", *(() if mixes else ("gradient",)))
    for key, nature in natures.found.items():
        if key[0] in kinds and not nature.is_exact:
            of_comparing(
                model,
                _NAMES[key[0]],
                f"ratio {nature.ratio:.2f}, residual {nature.residual:.2f}",
            )
        if key[0] == "state" and not nature.is_exact:
            _of_state(model, str(key[1]))


def of_comparing(model: keras.Model, what: str, measured: str) -> None:
    """Warns of a loss that is neither a mean nor a sum over samples."""
    _once(
        model,
        f"The {what} of a batch is neither the mean nor the sum of those of "
        f"its parts ({measured}): it compares samples with each other, or "
        "adds a sum to a mean. Each replica sees its part of the batch only, "
        "and their mean is taken, so the result differs from that of one "
        "device. Make every part a mean over samples, or compare within the "
        "part of a replica; weigh_samples=True of the strategy says that the "
        "mean is what you want.",
    )


def of_mixing(model: keras.Model, layer: keras.Layer, op: str) -> None:
    """Warns of a layer that mixes the samples of a batch."""
    _once(
        model,
        f"The layer {layer.name!r} ({type(layer).__name__}) mixes the samples "
        f"of a batch, in the op {op!r}. Each replica sees its part of the "
        "batch only, so the result differs from that of one device. Reduce "
        "along other axes than the first one, such as `axis=-1` or "
        "`axes=1`, or first get the rows of all replicas, with "
        "`tf.distribute.get_replica_context().all_gather(x, axis=0)`; "
        "weigh_samples=True of the strategy says that parts of the batch are "
        "what you want.",
    )


def of_large_loss(model: keras.Model, name: str, nbytes: int) -> None:
    """Warns of a loss whose samples are too large to be sent to workers."""
    most = size_of(whole_batch.MOST_BYTES_OF_A_SAMPLE)
    _once(
        model,
        f"The loss {name!r} is not known to be one value per sample, so it is "
        "that of the whole batch only if every worker gets all targets and "
        f"outputs. Those of one sample have {size_of(nbytes)}, more than "
        f"{most}, or a dtype that cannot be sent: each replica computes it on "
        "its part of the batch, and it is measured whether it is a mean or a "
        "sum. Pass one of Keras's losses of one value per sample, such as "
        '`loss="mse"` with a `sample_weight` in the place of a mask, or make '
        "the strategy with `weigh_samples=True` to say that the mean over the "
        "replicas is what you want.",
    )


def _of_state(model: keras.Model, name: str) -> None:
    """Warns of a variable that a step assigns what is no mean and no sum."""
    _once(
        model,
        f"What a step adds to the variable {name!r} is neither the mean nor "
        "the sum of what parts of the batch add to it. Each replica sees its "
        "part of the batch only, and their mean is taken, so the variable "
        "differs from that of one device. Keep means or sums over samples in "
        "variables, a variance as the mean of squares for example.",
    )


def of_metric(model: keras.Model, metric: keras.metrics.Metric) -> None:
    """Warns of a metric whose state does not add up over the replicas."""
    _once(
        model,
        f"The state of a metric is added up over the replicas. That of "
        f"{metric.name!r} does not add up: its values on parts of a batch are "
        "not those of the batch, so what is shown differs from one device. "
        "Keep sums in its variables, and compute what is shown in `result`.",
    )


_NAMES = {
    "gradient": "gradient",
    "loss": "loss",
    "added": "loss that a layer adds with `add_loss`",
}


def _once(model: keras.Model, warning: str) -> None:
    if model not in _warned:
        _warned.add(model)
        warnings.warn(warning, stacklevel=3)
