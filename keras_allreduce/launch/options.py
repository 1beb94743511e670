"""Reads the command line and plans the environment of each worker."""

import argparse
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from keras_allreduce import environment
from keras_allreduce.addresses import parse_addresses
from keras_allreduce.environment import HOST_DEVICES
from keras_allreduce.launch import gpus
from keras_allreduce.launch.output import tag

_LEAST_COLUMNS = 20

_PYTHON = re.compile(r"python[\d.]*")

_DESCRIPTION = """
Starts the workers of a training script that uses MultiWorkerAllReduceStrategy,
shows their output together, and ends all of them when one fails.

On one host, --workers starts all of them, with free ports on loopback. On
several hosts, the same command runs once on each, with the same --hosts and
its own --host-index: there is one worker per host, at the address listed.
"""

_EPILOG = """
Exit code: that of the worker that failed first, 128 + n if signal n ended it.
A process that a worker starts ends with its worker, unless it makes a session
of its own.
"""


@dataclass(frozen=True)
class LaunchOptions:
    """Options of the command line.

    Attributes:
        command: The script, or `-m` and a module, and its arguments.
        num_workers: Workers to start here; 1 if `hosts` are given.
        devices_per_worker: Host devices of each worker; `None`: not said.
        gpus: GPUs of each worker started here; empty: as the environment says.
        restarts: How often the job may start again after a failure.
        hosts: `host:port` of all workers, or empty: all run here.
        host_index: Which of `hosts` this one is.
        grace_seconds: Time to end after a signal, before SIGKILL.
        output_dir: Folder of a file with all output of each worker started
            here; `None`: none.
    """

    command: tuple[str, ...]
    num_workers: int
    devices_per_worker: int | None
    gpus: tuple[tuple[str, ...], ...]
    restarts: int
    hosts: tuple[str, ...]
    host_index: int
    grace_seconds: float
    output_dir: Path | None


def parse(arguments: Sequence[str] | None = None) -> LaunchOptions:
    """Reads the command line; ends with exit code 2 if it makes no sense.

    Args:
        arguments: Words after the program; `None`: those of this process.

    Returns:
        The options, checked.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _check(given)
        hosts = parse_hosts(given.hosts) if given.hosts is not None else ()
        _check_place(given, hosts)
        gpus = _gpus(given)
        _make_folder(given.output_dir)
    except ValueError as error:
        parser.error(str(error))
    return LaunchOptions(
        command=_command(given),
        num_workers=given.workers or 1,
        devices_per_worker=given.devices_per_worker,
        gpus=gpus,
        restarts=given.restarts,
        hosts=hosts,
        host_index=given.host_index or 0,
        grace_seconds=given.grace_seconds,
        output_dir=given.output_dir,
    )


def parse_hosts(text: str) -> tuple[str, ...]:
    """Splits `"a:12345,b:12345"` into addresses.

    Raises:
        ValueError: If one is not `host:port` or is there twice.
    """
    hosts = tuple(host.strip() for host in text.split(","))
    try:
        parse_addresses(hosts)
    except ValueError as error:
        raise ValueError(
            "--hosts must list host:port of each worker, such as "
            f"a:12345,b:12345. Received: {text!r}. {error}"
        ) from None
    return hosts


def environments(
    options: LaunchOptions,
    addresses: Sequence[str],
    columns: int | None = None,
) -> dict[int, dict[str, str]]:
    """Plans the additions to the environment of each worker started here.

    Args:
        options: Options of the command line.
        addresses: `host:port` of all workers.
        columns: Columns of the terminal, `None` if there is none.

    Returns:
        By index of the worker, in ascending order.
    """
    here = [options.host_index] if options.hosts else range(len(addresses))
    # Those of other hosts could not know it.
    token = "" if options.hosts else secrets.token_hex(16)
    return {
        index: _environment(options, addresses, index, token)
        | _columns_beside(tag(index), columns)
        for index in here
    }


def _columns_beside(begin: str, columns: int | None) -> dict[str, str]:
    """The columns that are left for the output of a worker."""
    if columns is None:
        return {}
    left = str(max(columns - len(begin), _LEAST_COLUMNS))
    # Ours is for the fit output, the other for tables, as of `model.summary()`.
    return {environment.COLUMNS: left, "COLUMNS": left}


def _environment(
    options: LaunchOptions, addresses: Sequence[str], index: int, token: str
) -> dict[str, str]:
    config = {
        "cluster": {"worker": list(addresses)},
        "task": {"type": "worker", "index": index},
    }
    # Lines arrive as they are written, not when a buffer is full.
    added = {
        environment.TF_CONFIG: json.dumps(config),
        "PYTHONUNBUFFERED": "1",
    }
    if token:
        added[environment.JOB_TOKEN] = token
    if options.gpus:
        added[environment.VISIBLE_GPUS] = ",".join(options.gpus[index])
    elif (options.devices_per_worker or 1) > 1:
        added[HOST_DEVICES] = str(options.devices_per_worker)
    return added


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_allreduce.launch",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    _add_options(parser.add_argument)
    _add_command(parser.add_argument)
    return parser


class _OfAnotherLauncher(argparse.Action):
    """An option of mpirun, horovodrun or torchrun: an error that names ours."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(
            f"There is no option {option_string}. Received: {option_string} "
            f"{values}. {self.const}"
        )


_WORKERS = "Pass --workers W, the number of workers on this host."
_HOSTS = "Pass --hosts A:PORT,B:PORT, the same on every host, and --host-index."
_THEIRS = {
    ("-n", "-np", "--np", "--num-proc"): _WORKERS,
    ("--nproc-per-node", "--nproc_per_node"): (
        f"{_WORKERS} A worker may have several GPUs: --devices-per-worker."
    ),
    ("-H", "--host", "--nnodes"): _HOSTS,
}
"""What to write instead, by the options of other launchers."""


def _add_options(add: Callable[..., Any]) -> None:
    for names, ours in _THEIRS.items():
        add(
            *names,
            action=_OfAnotherLauncher,
            const=ours,
            help=argparse.SUPPRESS,
        )
    add("--workers", type=int, metavar="W", help="workers on this host")
    add(
        "--devices-per-worker",
        type=int,
        metavar="D",
        help="GPUs of each worker, an equal share by default (sets "
        f"{environment.VISIBLE_GPUS}); on a machine without, its host (CPU) "
        f"devices, 1 by default (sets {HOST_DEVICES}=D, which "
        "MultiWorkerAllReduceStrategy reads)",
    )
    add(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start the whole job again after a failure, up to N times, with "
        "new ports; with keras.callbacks.BackupAndRestore it goes on where it "
        "was. With --hosts give it on every host",
    )
    add(
        "--hosts",
        metavar="A:PORT,B:PORT",
        help="all workers, one per host, the same list on every host",
    )
    add(
        "--host-index",
        type=int,
        metavar="I",
        help="which of --hosts this is, from 0",
    )
    add(
        "--grace-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="how long a worker may take to end after a signal before it gets "
        "SIGKILL (default: %(default)g)",
    )
    add(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help="append all that worker N writes to FOLDER/worker-N.log too, as it"
        " is: the progress bars of all workers, and the output of restarts",
    )


def _add_command(add: Callable[..., Any]) -> None:
    add(
        "-m",
        nargs=argparse.REMAINDER,
        metavar="MODULE",
        dest="module",
        help="run a module and its arguments, as python -m does, instead of a "
        "script",
    )
    add(
        "script",
        nargs="?",
        help="training script, the same on all workers",
    )
    add("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def _make_folder(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            "--output-dir must be a folder that can be written. Received: "
            f"{folder} ({error.strerror})"
        ) from None


def _gpus(given: argparse.Namespace) -> tuple[tuple[str, ...], ...]:
    """GPUs of each worker, if there are workers to deal them out to."""
    if given.hosts is not None or given.workers < 2:
        return ()
    return gpus.deal(
        gpus.visible_gpus(os.environ),
        given.workers,
        given.devices_per_worker,
        shared=os.environ.get(environment.NCCL_SHARED_GPU) == "1",
    )


def _command(given: argparse.Namespace) -> tuple[str, ...]:
    if given.module is not None:
        return ("-m", *given.module)
    return (given.script, *given.arguments)


def _check(given: argparse.Namespace) -> None:
    least = {
        "--workers": (given.workers, 1),
        "--devices-per-worker": (given.devices_per_worker, 1),
        "--restarts": (given.restarts, 0),
        "--grace-seconds": (given.grace_seconds, 0),
    }
    for option, (value, minimum) in least.items():
        if value is not None and not value >= minimum:
            raise ValueError(
                f"{option} must be at least {minimum}. Received: {value}"
            )
    _check_command(given)


def _check_command(given: argparse.Namespace) -> None:
    if given.module is None:
        if given.script is None:
            raise ValueError("Pass a training script, or -m and a module.")
        if _PYTHON.fullmatch(Path(given.script).name):
            raise ValueError(
                "A training script is expected, which runs in this Python. "
                f"Received: {given.script!r}. Leave `{given.script}` out."
            )
        if not Path(given.script).is_file():
            raise ValueError(f"There is no script {given.script!r}.")
        return
    if not given.module:
        raise ValueError("-m must be followed by a module.")
    # Its package alone is looked for: a module is found by importing it.
    package = given.module[0].partition(".")[0]
    if not package.isidentifier() or not importlib.util.find_spec(package):
        raise ValueError(f"There is no module {given.module[0]!r}.")


def _check_place(given: argparse.Namespace, hosts: tuple[str, ...]) -> None:
    if not hosts:
        if given.workers is None:
            raise ValueError(
                "Pass --workers, or --hosts and --host-index for several hosts."
            )
        if given.host_index is not None:
            raise ValueError(
                "--host-index goes with --hosts, which is missing."
            )
        return
    if given.workers not in (None, 1):
        raise ValueError(
            "--hosts lists one worker per host, so that --workers must be left "
            f"out. Received: --workers {given.workers}"
        )
    if given.host_index is None:
        raise ValueError(
            "--hosts needs --host-index: which of them this one is, from 0."
        )
    if not 0 <= given.host_index < len(hosts):
        raise ValueError(
            f"--host-index must be from 0 to {len(hosts) - 1}, as --hosts has "
            f"{len(hosts)}. Received: {given.host_index}"
        )
