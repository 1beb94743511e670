"""What one GPU can show in about nine minutes, the most valuable first.

    python benchmarks/on_one_gpu.py --output /tmp/on_one_gpu

    tests        tests/test_on_gpus.py, failures of workers among them, in
                 several processes at once
    resnet50     whole_fit.py: a step without a strategy, under MirroredStrategy
    transformer  and under AllReduceStrategy, with the GPU to itself
    input        fit_wall_time.py: what of a fit is no step
    packs        capacities of a pack, between two workers on the GPU
    xla ...      whole_fit.py --jit: both models with and without XLA, under no
                 strategy, MirroredStrategy and AllReduceStrategy, with the GPU
                 to itself and split in two; only what `--parts` names

Two replicas or workers share the GPU through NCCL (from 2.30 on). Every part
has a time limit of its own, prints its table at once, and leaves what it
printed in a file, so that a run that is cut off has shown what it has.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# How two ranks share one GPU.
SHARED_GPU = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "4",
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}

COMPARED = ["no strategy", "MirroredStrategy", "AllReduceStrategy"]


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments]


def whole_fit(
    model: str, seconds: int, steps: int, *replicas: str
) -> list[str]:
    options = ["--gpus", "--replicas", *replicas, "--models", model]
    options += ["--rounds", "7"]
    limits = ["--seconds", str(seconds), "--steps", str(steps)]
    return script("whole_fit.py", *options, *limits, "--strategies", *COMPARED)


def with_xla(model: str, seconds: int, steps: int, replicas: str) -> list[str]:
    return [*whole_fit(model, seconds, steps, replicas), "--jit"]


def pytest(selected: str, *options: str) -> list[str]:
    tests = REPOSITORY / "tests" / "test_on_gpus.py"
    shown = ["-v", "-rfEP", "--durations=5", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *shown, *options, str(tests)]
    return [*command, "-k", selected]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        commands: Command lines by name. They run at the same time.
        seconds: When those that still run are ended.
        shown: Pattern of the lines of their output that are printed.
    """

    commands: dict[str, list[str]]
    seconds: float
    shown: str = "."


# About half of the cases of two workers, with `embedding` and `predict`.
HALF = (
    "embedding or predict or evaluate or eagerly or steps_per or dataset or "
    "batch or two_outputs or validation or early"
)
TESTS = {
    "workers 1": pytest(f"with_a_gpu_each and ({HALF})"),
    "workers 2": pytest(f"with_a_gpu_each and not ({HALF})"),
    "one process": pytest(
        "TestOneProcess or default_is or tensorflow_has", "-n", "8"
    ),
    "killed": pytest("killed"),
    "frozen": pytest("frozen or without_memory"),
    "other models": pytest("other_models"),
}

PARTS = {
    "tests": Part(
        TESTS,
        170,
        r"=.*(passed|failed|error|skipped)|^FAILED|^ERROR|^E  | s, exit code|"
        "^keras_allreduce:",
    ),
    "resnet50": Part(
        {"resnet50": whole_fit("resnet50_photos", 160, 35, "1")}, 200
    ),
    "transformer": Part(
        {"transformer": whole_fit("transformer_base", 120, 20, "1")}, 160
    ),
    "input": Part(
        {
            "input": script(
                "fit_wall_time.py",
                *("--gpus", "--replicas", "1", "--rounds", "2"),
                *("--seconds", "60", "--data", "arrays"),
                *("--lengths", "0.5", "--epochs", "8"),
                *("--strategies", *COMPARED),
            )
        },
        150,
    ),
    "packs": Part(
        {
            "packs": [
                *(sys.executable, "-m", "keras_allreduce.launch"),
                *("--workers", "2", "-m", "keras_allreduce.benchmark"),
                *("--model", "keras.applications:ResNet50", "--rounds", "10"),
                *("--bytes-per-pack", "1M,4M,16M,64M,256M,0"),
            ]
        },
        90,
    ),
}

# Too long to be among the others: each model compiles for a minute or more.
XLA_PARTS = {
    f"xla {model} {replicas}": Part(
        {f"xla {model} {replicas}": with_xla(model, 240, steps, replicas)}, 290
    )
    for model, steps in (("resnet50_photos", 35), ("transformer_base", 20))
    for replicas in ("1", "2")
}


def run(part: Part, folder: Path, seconds: float) -> None:
    """Runs one part and prints its table."""
    begun = time.monotonic()
    end = begun + min(part.seconds, seconds)
    running = {}
    for name, command in part.commands.items():
        output = folder / f"{re.sub(r'[^a-z0-9]+', '_', name)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=REPOSITORY,
                env=SHARED_GPU
                | {"PYTHONPATH": str(REPOSITORY)}
                | os.environ
                | {"PYTHONUNBUFFERED": "1"},
            )
        running[name] = process, output
    for name, (process, output) in running.items():
        code = waited(process, end)
        print(
            f"--- {name}: {code}, {time.monotonic() - begun:.0f} s", flush=True
        )
        text = output.read_text(errors="replace")
        if "PASSED" in text:
            print(len(re.findall(r"\] PASSED|PASSED +\[", text)), "passed")
        lines = [
            line for line in text.splitlines() if re.search(part.shown, line)
        ]
        print("\n".join(lines[-40:]), flush=True)


def waited(process: subprocess.Popen, end: float) -> str:
    """Waits for a process and all it has started; says how it ended."""
    try:
        code = process.wait(max(0, end - time.monotonic()))
        return f"exit code {code}"
    except subprocess.TimeoutExpired:
        # So that it ends the processes in sessions of their own.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return "cut off"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*PARTS, *XLA_PARTS],
        default=list(PARTS),
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="for all; default: 600"
    )
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed()
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    for name in args.parts:
        left = end - time.monotonic()
        if left < 20:
            print(f"\n=== {name}: no time left", flush=True)
            continue
        print(f"\n=== {name}", flush=True)
        run((PARTS | XLA_PARTS)[name], args.output, left)


if __name__ == "__main__":
    main()
