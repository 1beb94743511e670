"""How long do many workers take to their first step?

    python benchmarks/start_up.py --workers 2 8 16

All workers run on this machine, over loopback, so that they share its cores:
what as many processes take that train by themselves at the same time ("alone")
is a floor. Seconds are from the start of the processes, which are forked from
one that has imported TensorFlow and Keras, to the end of the first step of the
last one; CPU seconds are those of one of them until then. The model has the
variables of ResNet-50 in small, and Adam's for each.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tests" / "harness")]

import command_line
import warm_python

from keras_allreduce.launch.job import free_ports

LAYERS = 53


def work(folder: str, limit: int) -> None:
    """Trains for a step as one worker, and writes when it was over."""
    import keras
    import numpy as np

    import keras_allreduce

    keras.utils.set_random_seed(1)
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=limit
    )
    with strategy.scope():
        layers: list[Any] = [keras.Input([8])]
        for _ in range(LAYERS):
            layers += [
                keras.layers.Dense(8, use_bias=False),
                keras.layers.BatchNormalization(),
            ]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile("adam", "mse", jit_compile=False)

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 0:
                took = {"end": time.time(), "cpu": time.process_time()}
                rank = os.environ["START_UP_RANK"]
                Path(folder, rank).write_text(json.dumps(took))

    x = np.ones([2 * strategy.num_replicas_in_sync, 8], "float32")
    batch = strategy.num_replicas_in_sync
    model.fit(x, x[:, :1], batch_size=batch, verbose=0, callbacks=[Clock()])


def seconds(workers: int, together: bool, limit: int) -> tuple[float, float]:
    """Seconds to the first step of all, and CPU seconds of one."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        processes = []
        for rank, address in enumerate(addresses):
            clusters = (addresses, rank) if together else ([address], 0)
            processes.append(
                warm_python.Process(
                    [str(Path(__file__).resolve()), folder, str(limit)],
                    folder=folder,
                    environment={
                        **os.environ,
                        **command_line.tf_config(*clusters),
                        "START_UP_RANK": str(rank),
                        "TF_CPP_MIN_LOG_LEVEL": "3",
                        "CUDA_VISIBLE_DEVICES": "-1",
                    },
                    stdout=Path(folder, f"output{rank}"),
                    stderr=Path(folder, f"output{rank}"),
                )
            )
        try:
            codes = command_line.wait(processes, limit)
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            said = Path(folder, "output0").read_text(errors="replace")
            raise SystemExit(f"{said[-2000:]}\nExit codes: {codes}")
        took = [
            json.loads(Path(folder, str(rank)).read_text())
            for rank in range(workers)
        ]
    last = max(each["end"] for each in took)
    return last - began, statistics.median(each["cpu"] for each in took)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 8, 16])
    parser.add_argument("--limit", type=int, default=600, help="seconds")
    args = parser.parse_args()
    print(f"{command_line.environment('tensorflow', 'keras')}\n")
    print("| workers | alone | together |\n|---|---|---|")
    for workers in args.workers:
        cells = []
        for together in (False, True):
            wall, cpu = seconds(workers, together, args.limit)
            cells.append(f"{wall:.1f} s ({cpu:.1f})")
        print(f"| {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_dir():
        work(sys.argv[1], int(sys.argv[2]))
    else:
        main()
