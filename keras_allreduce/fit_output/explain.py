"""Prints the plan of a step before there was one, as `model.summary()` does."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import rich.console
import rich.markup
import rich.table
import tensorflow as tf

from keras_allreduce.compat import keras_losses
from keras_allreduce.fit_output.gradients import ModelGradients
from keras_allreduce.fit_output.recording import names_in_pack
from keras_allreduce.reduce import cost_model, pack_sizes
from keras_allreduce.reduce.buckets import plan_buckets
from keras_allreduce.reduce.cost_model import Link
from keras_allreduce.reduce.pack_sizes import PackSize
from keras_allreduce.reduce.packing import spec_of
from keras_allreduce.reduce.plan import ReducePlan, size_of
from keras_allreduce.reduce.sparse import RowsSpec

NAMES_PER_PACK = 6
"""Names that are listed of one pack."""

# Keras's colors of numbers and of types.
_NUMBER, _TYPE = "color(34)", "color(33)"


WORKERS = (2, 4, 8, 16, 64)
"""Numbers of workers that are predicted."""


def check_prediction(link: Link | None, step_seconds: float | None) -> None:
    """Raises if one comes without the other.

    Raises:
        ValueError: If it does.
    """
    if (link is None) != (step_seconds is None):
        raise ValueError(
            "A prediction needs both `link` and `step_seconds`. Received: "
            f"link={link}, step_seconds={step_seconds}. Pass both or none."
        )


def show(
    model: keras.Model,
    plan: ReducePlan,
    gradients: ModelGradients,
    bytes_per_pack: int,
    link: Link | None = None,
    step_seconds: float | None = None,
    print_fn: Callable[[str], Any] | None = None,
) -> None:
    """Prints a table of the packs, and lines with totals.

    Args:
        model: The model.
        plan: What its step sends.
        gradients: The gradients that were planned.
        bytes_per_pack: Capacity of a pack that was asked for; 0: none.
        link: With it, also the cost that is predicted between more workers.
        step_seconds: Seconds of a step without all-reduce, then.
        print_fn: Called with the text. `None`: printed, in color in a
            terminal or a notebook; with interactive logging off, absl's log.
    """
    if not print_fn and not keras.config.is_interactive_logging_enabled():
        print_fn = keras_log
    captured = io.StringIO() if print_fn else None
    console = rich.console.Console(file=captured, highlight=False)
    console.print(f'[bold]Model: "{rich.markup.escape(model.name)}"[/]')
    if plan.num_replicas == 1:
        totals = [("All-reduce", "none, 1 replica")]
    else:
        totals = _totals(plan, gradients)
        console.print(_table(plan, gradients))
    for name, text in totals:
        console.print(f"[bold] {name}: [/]{rich.markup.escape(text)}")
    if link is not None and step_seconds is not None:
        specs = gradients.specs
        for line in _predicted(specs, link, step_seconds, bytes_per_pack):
            console.print(f" {line}")
    for note in (*_notes(model, gradients), *_losses(model, plan)):
        console.print(f" {rich.markup.escape(note)}")
    if captured and print_fn:
        print_fn(captured.getvalue())


def keras_log(text: str) -> None:
    """Logs as Keras logs without interactive logging."""
    from absl import logging

    logging.info(text)


def _table(plan: ReducePlan, gradients: ModelGradients) -> rich.table.Table:
    table = rich.table.Table(show_lines=True)
    table.add_column("Pack", justify="right", no_wrap=True)
    table.add_column("Gradients of (in the order of backprop)")
    table.add_column("Type", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    if plan.sent:
        table.add_column("Each sends", justify="right", no_wrap=True)
    for number, pack in enumerate(plan.packs):
        names = names_in_pack(gradients.paths, pack.indices)
        sparse = number >= plan.num_packs
        kind = f"{pack.dtype} rows" if sparse else pack.dtype
        row = [
            f"[{_NUMBER}]{number}[/]",
            rich.markup.escape("\n".join(_shortened(names))),
            f"[{_TYPE}]{kind}[/]",
            f"[{_NUMBER}]{_size(pack.nbytes)}[/]",
        ]
        if plan.sent:
            row.append(f"[{_NUMBER}]{_size(plan.sent[number])}[/]")
        table.add_row(*row)
    return table


def _totals(
    plan: ReducePlan, gradients: ModelGradients
) -> list[tuple[str, str]]:
    dense = [pack.nbytes for pack in plan.packs[: plan.num_packs]]
    known = [size for size in dense if size is not None]
    size = size_of(sum(known)) + (
        "" if len(known) == len(dense) else ", and what is not known"
    )
    lines = [
        (
            "Dense gradients",
            f"{plan.num_gradients} in {plan.num_packs} "
            f"{'pack' if plan.num_packs == 1 else 'packs'} ({size})",
        )
    ]
    if plan.num_sparse:
        lines.append(
            (
                "Sparse gradients",
                f"{plan.num_sparse}, whose rows are gathered (as many as "
                "a batch has)",
            )
        )
    how = f"{plan.algorithm} over {plan.num_replicas} replicas"
    lines.append(
        ("All-reduce", f"{how}; {plan.reason}" if plan.reason else how)
    )
    if plan.parts:
        lines.append(("Compiled by XLA", f"in {plan.parts_text}"))
    if plan.every > 1:
        lines.append(("Sent", f"once in {plan.every} steps"))
    if gradients.without:
        names = ", ".join(_shortened(gradients.without))
        lines.append(("Trainable, but without a gradient", names))
    return lines


def _predicted(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    link: Link,
    step_seconds: float,
    bytes_per_pack: int,
) -> Iterator[str]:
    yield "[bold]Predicted for workers of one device each:[/]"
    for workers in WORKERS:
        exposed = _exposed_seconds(
            gradients, workers, link, step_seconds, bytes_per_pack
        )
        if exposed is None:
            yield "  not with sparse gradients or unknown sizes"
            return
        share = cost_model.efficiency(step_seconds, exposed)
        yield (
            f"  [{_NUMBER}]{workers:3}[/] workers: "
            f"[{_NUMBER}]{exposed * 1e3:.3g}[/] ms exposed, efficiency "
            f"[{_NUMBER}]{share:.0%}[/]"
        )


def _exposed_seconds(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    workers: int,
    link: Link,
    step_seconds: float,
    bytes_per_pack: int,
) -> float | None:
    """Exposed time of the all-reduce, by the model of docs/algorithms.md.

    Args:
        gradients: Specs of all gradients.
        workers: Number of workers, of one device each.
        link: How they reach each other.
        step_seconds: Seconds of a step without all-reduce.
        bytes_per_pack: Capacity of a pack; 0: as chosen between workers.

    Returns:
        Seconds. `None` if a gradient is sparse or of unknown size: how many
        bytes cross is not known then.
    """
    packs = _packs(gradients, workers, bytes_per_pack)
    if packs is None:
        return None

    def cost(nbytes: float) -> float:
        return cost_model.workers_seconds(nbytes, workers, link)

    def busy(nbytes: float) -> float:
        return cost_model.workers_seconds(nbytes, workers, link.busy())

    return cost_model.exposed_seconds(packs, step_seconds, cost, busy)


def _packs(
    gradients: Sequence[tf.TensorSpec | RowsSpec],
    workers: int,
    bytes_per_pack: int,
) -> list[int] | None:
    """Bytes of each pack in the order of leaving, `None` if not known."""
    if any(isinstance(each, RowsSpec) for each in gradients):
        return None
    specs = [spec_of(each) for each in gradients]
    size = PackSize(bytes_per_pack)
    if not bytes_per_pack:
        nbytes = sum(spec.nbytes or 0 for spec in specs)
        size = pack_sizes.between_workers(workers, nbytes)
    packs = plan_buckets(
        specs, size.bytes_per_pack, size.first_bytes_per_pack, size.alone_above
    )
    known = [pack.nbytes for pack in packs if pack.nbytes is not None]
    return known if len(known) == len(packs) else None


def _notes(model: keras.Model, gradients: ModelGradients) -> Iterator[str]:
    """Notes on gradients that could not be determined."""
    if not gradients.callable:
        yield (
            "The model has no `call`, so all gradients are taken for dense "
            "ones."
        )
    elif not gradients.traced:
        yield (
            "The inputs of the model are not known, so all gradients are "
            "taken for dense ones. Pass a batch as `x`."
        )
    if type(model).train_step is not keras.Model.train_step:
        yield (
            "The model has its own `train_step`; this is what an update of "
            "all its variables sends."
        )


def _losses(model: keras.Model, plan: ReducePlan) -> Iterator[str]:
    """Losses that cost more than a sum of gradients."""
    if (
        plan.num_replicas == 1
        or model.distribute_strategy.weigh_samples is not None
    ):
        return
    for name in keras_losses.losses_of_batch(model):
        yield (
            f"The loss {name!r} is not known to be one value per sample: "
            "every replica computes that of the whole batch, and gets the "
            "targets and outputs of all others in every step. "
            + (
                "They are sent between workers; the plan line of the "
                "first epoch says how large a sample is."
                if plan.sent
                else "They are shared without a copy."
            )
        )


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else size_of(nbytes)


def _shortened(names: Sequence[str]) -> list[str]:
    """The first names and the last, with `... n more` in place of the rest."""
    if len(names) <= NAMES_PER_PACK:
        return list(names)
    left_out = f"... {len(names) - NAMES_PER_PACK + 1} more"
    return [*names[: NAMES_PER_PACK - 2], left_out, names[-1]]
