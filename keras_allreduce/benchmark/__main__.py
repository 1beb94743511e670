"""The command line: `python -m keras_allreduce.benchmark --help`."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from keras_allreduce.benchmark.options import options_of, parser
from keras_allreduce.benchmark.run import (
    about,
    measure,
    messages_for,
    strategies_for,
)
from keras_allreduce.benchmark.table import Row, document, head, line, verdict
from keras_allreduce.benchmark.timed_loop import Message, WrongSumError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    command_line = parser()
    given = command_line.parse_args(arguments)
    try:
        options = options_of(given)
        strategies = strategies_for(options)
        strategy = next(iter(strategies.values()))
        if strategy.num_replicas_in_sync < 2:
            raise ValueError(
                "One replica has nothing to reduce. Pass --replicas 2, with "
                "CUDA_VISIBLE_DEVICES=-1 if there is one GPU."
            )
        messages = list(messages_for(options))
        for gradients in messages:
            Message(strategy, gradients)
    except ValueError as error:
        command_line.error(str(error))
    is_chief = strategy.extended.is_chief
    show = is_chief and not options.as_json
    if show:
        _print(*_header(about(strategies, options)), head())
    rows: list[Row] = []
    for gradients in messages:
        try:
            new = measure(strategies, gradients, options)
        except WrongSumError as error:
            print(f"{command_line.prog}: wrong: {error}", file=sys.stderr)
            return 1
        rows += new
        if show:
            _print(*map(line, new))
    if show:
        _print(*verdict(rows), "# Every sum was checked: all are right.")
    elif is_chief:
        _print(json.dumps(document(about(strategies, options), rows)))
    return 0


def _header(facts: dict[str, Any]) -> list[str]:
    here = len(facts["devices"])
    return [
        "# keras_allreduce {keras_allreduce}, TensorFlow {tensorflow}, Keras "
        "{keras}, Python {python}".format(**facts),
        f"# {facts['replicas']} replicas: {facts['workers']} worker(s) with "
        f"{here} x {facts['device_kind']}, {facts['cores']} cores here",
        f"# {facts['model'] or 'sizes'}, {facts['dtype'] or 'its own dtypes'}; "
        "algbw and busbw in 10^9 bytes per second",
    ]


def _print(*lines: str) -> None:
    # A table that is piped still appears row by row.
    print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
