"""How the cost of the all-reduce grows with the number of replicas.

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --measured scaling.json --plot docs/scaling.svg

Measures with `python -m keras_allreduce.benchmark`: logical CPU devices of one
process, workers on loopback, and workers in network namespaces with a link of
1 Gbit/s (`tests/harness/namespaces.py`). Each pass runs all settings, in turns,
in new processes. The model of `scaling_model.py` is fitted to 2 workers (and 2
logical CPU devices), and what it says of more is put next to what was
measured; then it says what a model would see on up to 64 workers. The second
command prints and draws again what was measured before.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "harness"))
import command_line
import namespaces
import scaling_report
from scaling_report import (
    LOOPBACK,
    PROCESS,
    WIRE,
    WORKERS,
    Measurement,
    Setting,
)

BENCHMARK = ["-m", "keras_allreduce.benchmark"]
DEADLINE_SECONDS = 200
CHIEF = "[worker 0] "

# Measuring ------------------------------------------------------------------


def settings(args: argparse.Namespace) -> list[Setting]:
    chosen = [Setting(PROCESS, 1, devices) for devices in (2, 4, 8)]
    chosen += [Setting(LOOPBACK, workers, 1) for workers in (2, 3, 4)]
    chosen += [Setting(LOOPBACK, 2, 2)]
    chosen += [Setting(WIRE, workers, 1) for workers in (2, 3, 4)]
    return [one for one in chosen if one.place in (PROCESS, *args.places)]


def measure(about: dict, args: argparse.Namespace) -> list[Measurement]:
    found = []
    chosen = settings(args)
    if args.backwards:
        chosen.reverse()
    for number in range(args.passes):
        # Every other pass goes backwards, against a drift within passes.
        for setting in chosen[:: -1 if number % 2 else 1]:
            start = time.monotonic()
            document = run(setting, args)
            found += [
                Measurement(setting, row["bytes"], row["median_us"] / 1e6)
                for row in document["rows"]
            ]
            if args.json:
                save(args.json, about, found)
            print(
                f"pass {number + 1}: {setting.place}, {setting.workers} x "
                f"{setting.devices}: {time.monotonic() - start:.0f} s",
                file=sys.stderr,
            )
    return found


def run(setting: Setting, args: argparse.Namespace) -> dict:
    """The document of the benchmark command."""
    options = ["--json", "--factor", "4", "--max-bytes", args.max_bytes]
    options += ["--rounds", str(args.rounds), "--warmup", "0"]
    if setting.place == PROCESS:
        options += ["--replicas", str(setting.devices)]
        return document_in(alone([*BENCHMARK, *options]))
    if setting.place == LOOPBACK:
        launch = ["-m", "keras_allreduce.launch"]
        launch += ["--workers", str(setting.workers)]
        launch += ["--devices-per-worker", str(setting.devices)]
        return document_in(alone([*launch, *BENCHMARK, *options]))
    with namespaces.network(setting.workers, rate=setting.place) as network:
        return document_in(in_namespaces(network, [*BENCHMARK, *options]))


def alone(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr[-3000:]}\n{arguments} failed.")
    return done.stdout


def in_namespaces(network: namespaces.Network, arguments: list[str]) -> str:
    """What the chief prints, once all workers have ended well."""
    command = [sys.executable, *arguments]
    addresses = [f"{host}:12345" for host in network.addresses]
    with contextlib.ExitStack() as stack:
        files, processes = [], []
        for index in range(len(addresses)):
            files.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            process = subprocess.Popen(
                network.command(index, command),
                env={
                    **os.environ,
                    **command_line.tf_config(addresses, index),
                    "CUDA_VISIBLE_DEVICES": "-1",
                },
                stdout=files[-1],
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        command_line.wait(processes, DEADLINE_SECONDS)
        for process in processes:
            process.kill()
            process.wait()
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read())
    codes = [process.returncode for process in processes]
    if any(codes):
        raise SystemExit(
            "\n".join(text[-3000:] for text in said) + f"\nExit codes: {codes}"
        )
    return said[0]


def document_in(output: str) -> dict:
    for line in output.splitlines():
        text = line.removeprefix(CHIEF)
        if text.startswith("{"):
            return json.loads(text)
    raise SystemExit(f"The benchmark printed no document:\n{output[-3000:]}")


def environment() -> dict:
    names = ("keras_allreduce", "tensorflow", "keras")
    return {
        **{name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }


def report(about: dict, found: list[Measurement], args) -> None:
    times = scaling_report.medians(found)
    models = scaling_report.fit(times, about["cores"])
    latencies = scaling_report.latencies(models, args)
    slower = scaling_report.spread(found)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"Slowest / fastest pass: {slower:.2f} (median)")
    tables = {
        "Fitted": scaling_report.fit_table(models),
        "How far off (median over sizes)": scaling_report.summary_table(
            times, models
        ),
        "Predicted and measured": scaling_report.compared_table(times, models),
    }
    for title, alpha in latencies.items():
        tables[f"Predicted, {title}"] = scaling_report.predicted_table(
            alpha, models.inside, args
        )
    for title, lines in tables.items():
        print(f"\n{title}:\n", *lines, sep="\n")
    if args.plot:
        import scaling_plot  # Needs matplotlib.

        scaling_plot.draw(args.plot, times, models, latencies, args)


def save(path: str, about: dict, found: list[Measurement]) -> None:
    document = {"about": about, "measurements": [*map(asdict, found)]}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def load(paths: list[str]) -> tuple[dict, list[Measurement]]:
    """What the files hold together; they must be of one environment.

    Raises:
        SystemExit: If they are not.
    """
    documents = [json.loads(Path(path).read_text()) for path in paths]
    abouts = [document["about"] for document in documents]
    if any(about != abouts[0] for about in abouts):
        raise SystemExit(
            "Files that go together must be of one environment. "
            f"Received: {abouts}"
        )
    found = [
        Measurement(Setting(**one["setting"]), one["nbytes"], one["seconds"])
        for document in documents
        for one in document["measurements"]
    ]
    return abouts[0], found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    places = [LOOPBACK, WIRE]
    add(
        "--places",
        nargs="+",
        choices=places,
        default=places,
        help="of workers; one process is always measured",
    )
    add("--passes", type=int, default=2)
    add("--backwards", action="store_true", help="begin with the last setting")
    add("--rounds", type=int, default=3)
    add("--max-bytes", default="16M")
    add("--json", help="write what was measured to this file")
    add(
        "--measured",
        nargs="+",
        metavar="JSON",
        help="read what was measured from these files instead",
    )
    add("--plot", help="draw an SVG; needs matplotlib")
    add("--gradient-bytes", type=int, default=102_000_000, help="of a step")
    add("--compute-ms", type=float, default=200.0, help="of a step")
    add("--pack-bytes", type=int, help="default: as the package has it")
    add("--devices", type=int, default=8, help="of each machine")
    add("--latency-us", type=float, default=50.0, help="assumed, of a step")
    args = parser.parse_args()
    if args.devices < 1 or any(count % args.devices for count in WORKERS):
        parser.error(f"--devices must divide all of {WORKERS}.")
    return args


def main() -> None:
    args = arguments()
    # So that the workers and the network go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))
    if args.measured:
        report(*load(args.measured), args)
        return
    if WIRE in args.places and namespaces.missing():
        raise SystemExit(f"No link {WIRE}: {namespaces.missing()}")
    about = environment()
    report(about, measure(about, args), args)


if __name__ == "__main__":
    main()
