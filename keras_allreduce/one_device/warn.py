"""Warns, once of each kind for each model, of differences from one device."""

import warnings
from collections.abc import Collection

import keras

from keras_allreduce.one_device import facts, whole_batch
from keras_allreduce.one_device.reduction import (
    COMPARES,
    SHOWN,
    STATE,
    SUM,
    UNDECIDED,
    WEIGHTED,
    Reduction,
    Reductions,
)
from keras_allreduce.reduce.plan import size_of

_FAILURE = "failure"
_METRIC = "metric"
_LARGE = "large loss"
_MIXES = "mixes samples"
_OUTSIDE = "outside variable"
_SHOWN = "shown"

PARTS = (
    "Each replica runs the step on its part of a batch: if it is written for "
    "batches of one size, write `tf.shape(x)[0]` instead of the number."
)

_SAYS_SO = (
    "`weigh_samples=True` of the strategy says that losses are means over "
    "samples, `False` that they are sums."
)


def of_reductions(
    model: keras.Model, reductions: Reductions, *, is_custom: bool
) -> None:
    """Warns of values that were not measured, or are neither mean nor sum."""
    if reductions.failure:
        _once(
            model,
            _FAILURE,
            "Whether the loss of a custom step, or what a step keeps, is a "
            "mean or a sum over samples is measured on a few samples, which "
            f"failed: {reductions.failure}. It is taken for a mean. "
            f"{_SAYS_SO} {PARTS}",
        )
        return
    kinds = {key[0] for key in reductions.found}
    # Gradients of the tape are summed already when an optimizer applies them.
    applied = () if "gradient" in kinds else ("apply",)
    losses = {
        key: found
        for key, found in reductions.found.items()
        if key[0] in ("loss", "added", "gradient", *applied)
    }
    # Losses that Keras adds up may mix means and sums, each of which is right.
    mixes = not is_custom and any(
        found.kind == SUM
        for key, found in losses.items()
        if key[0] in ("loss", "added")
    )
    for key, found in losses.items():
        if found.is_exact:
            continue
        if mixes and key[0] in ("gradient", "apply"):
            continue
        _of_loss(model, key, found)
    for key, found in reductions.found.items():
        if key[0] == "state" and found.doubt == STATE:
            _of_state(model, str(key[1]))
    if is_custom:
        of_shown(model, reductions, {each.doubt for each in losses.values()})


def of_shown(
    model: keras.Model, reductions: Reductions, known: Collection[str] = ()
) -> None:
    """Warns of logs, and of what goes into metrics, that may be wrong.

    Args:
        model: The model.
        reductions: Those of its step.
        known: Doubts that losses have, which need not be said again.
    """
    names = [
        (f"metric {key[1]!r}" if key[0] == "metric" else f"log {key[-1]!r}")
        for key, found in reductions.found.items()
        if key[0] in SHOWN and found.doubt and found.doubt not in known
    ]
    if names:
        _once(
            model,
            _SHOWN,
            "What a step shows of a batch is not known to be the mean, the "
            "sum, the largest or the smallest of that of its parts. "
            f"Received: {', '.join(dict.fromkeys(names))}. The mean over the "
            "replicas is shown, which may differ from one device. Return "
            "`metric.result()` of a metric whose variables are sums over "
            "samples, and compute the rest, such as a root or a quotient, in "
            "its `result`.",
        )


def _of_loss(
    model: keras.Model, key: tuple[object, ...], found: Reduction
) -> None:
    """Warns of a loss by the reason."""
    what = _NAMES[str(key[0])]
    measured = f"ratio {found.ratio:.2f}, residual {found.residual:.2f}"
    if found.doubt == COMPARES:
        of_comparing(model, what, measured)
    elif found.doubt == WEIGHTED:
        _once(
            model,
            WEIGHTED,
            f"The {what} of a batch is a weighted mean of those of its parts: "
            "it is divided by something that parts of the batch have more or "
            "less of, such as tokens that are not masked. Each replica sees "
            "its part of the batch only, and their mean is taken by samples, "
            "so the result differs from that of one device. Write the "
            "division last, in the step itself: `loss = "
            "tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)`, not in a "
            "`tf.function`, and with `run_eagerly=False`; or divide by what "
            "is constant.",
        )
    elif found.doubt == UNDECIDED:
        _once(
            model,
            UNDECIDED,
            f"Whether the {what} of a batch is the mean or the sum of those "
            "of its parts is undecided: it is random, and its noise is too "
            f"large to tell ({measured}). It is taken for a {found.kind}. "
            f"{_SAYS_SO}",
        )


def of_comparing(model: keras.Model, what: str, measured: str) -> None:
    """Warns of a loss that is neither a mean nor a sum over samples."""
    _once(
        model,
        COMPARES,
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
        _MIXES,
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
        _LARGE,
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


def of_outside_variable(model: keras.Model, name: str) -> None:
    """Warns of a variable that has one value for all replicas."""
    _once(
        model,
        _OUTSIDE,
        "Variables that a step assigns are made in the scope of the strategy, "
        f"so that every replica has its own. Received: {name!r}, made outside "
        "of it. The replicas assign to the same variable, one after the other, "
        "so unless they add sums over samples or all assign one value, it "
        "differs from that of one device: a count of steps is a multiple. Make "
        "it inside `with strategy.scope():`.",
    )


def _of_state(model: keras.Model, name: str) -> None:
    """Warns of a variable whose assigned value is no mean and no sum."""
    _once(
        model,
        STATE,
        f"What a step adds to the variable {name!r} is neither the mean nor "
        "the sum of what parts of the batch add to it. Each replica sees its "
        "part of the batch only, and that of the first is taken, so the "
        "variable differs from that of one device. Keep means or sums over "
        "samples in variables, a variance as the mean of squares for example: "
        "`self.squares.assign(0.9 * self.squares + 0.1 * ops.mean(x * x))`.",
    )


def of_metric(model: keras.Model, metric: keras.metrics.Metric) -> None:
    """Warns of a metric whose state does not add up over the replicas."""
    _once(
        model,
        _METRIC,
        f"The state of a metric is added up over the replicas. That of "
        f"{metric.name!r} does not add up: its values on parts of a batch are "
        "not those of the batch, so what is shown differs from one device. "
        "Keep sums in its variables, and compute what is shown in `result`.",
    )


_NAMES = {
    "gradient": "gradient",
    "apply": "gradient",
    "loss": "loss",
    "added": "loss that a layer adds with `add_loss`",
}


def _once(model: keras.Model, kind: str, warning: str) -> None:
    warned = facts.of(model).warned
    if kind not in warned:
        warned.add(kind)
        warnings.warn(warning, stacklevel=3)
