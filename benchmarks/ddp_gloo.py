"""One worker of workers_step_time.py that trains with PyTorch.

Under DistributedDataParallel over gloo, or, to see what a step takes without
communication, without it. The models have the shapes of models.py, images
with channels first, as is usual in PyTorch; the loop is a plain one.
"""

import itertools
import os
from collections.abc import Callable

import torch
from torch import nn
from worker_jobs import ALONE_PYTORCH, DDP, Job, Result, Stopwatch, answer, told


def dense(*sizes: int) -> list[nn.Module]:
    """Dense layers from each size to the next, with relu between them."""
    layers: list[nn.Module] = []
    for size, next_size in itertools.pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.ReLU()]
    return layers[:-1]


def mlp() -> nn.Module:
    return nn.Sequential(*dense(1000, 1600, 1600, 800, 10))


def deep_narrow() -> nn.Module:
    return nn.Sequential(*dense(*[64] * 61, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        *dense(64 * 4 * 4, 64, 10),
    )


def wide() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, 128, 128, 128):
        layers += [nn.Conv2d(channels, 128, 3, padding="same"), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *dense(128 * 8 * 8, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (1000,)),
    "deep_narrow": (deep_narrow, (64,)),
    "cnn": (cnn, (3, 32, 32)),
    "wide": (wide, (3, 8, 8)),
}


def train(job: Job, model: nn.Module, shape: tuple[int, ...]) -> Stopwatch:
    """Trains; the stopwatch has the time of a step and the weights."""
    generator = torch.Generator().manual_seed(job.index)
    x = torch.randn((job.local_batch_size, *shape), generator=generator)
    y = torch.randint(10, (job.local_batch_size,), generator=generator)
    optimizer = {
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=1e-4),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01),
    }[job.optimizer]()
    loss_function = nn.CrossEntropyLoss()

    def read_weights() -> list:
        return [w.detach().numpy().copy() for w in model.parameters()]

    stopwatch = Stopwatch(job, read_weights)
    for _ in range(job.all_steps):
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        stopwatch.step_ended()
    if not torch.isfinite(loss):
        raise RuntimeError(f"The loss became {loss}.")
    return stopwatch


def work(job: Job) -> None:
    """Runs as one worker; leaves its result and its weights in the folder."""
    torch.manual_seed(1)
    make, shape = MODELS[job.model]
    model = make()
    if job.strategy == ALONE_PYTORCH:
        stopwatch = train(job, model, shape)
    elif job.strategy == DDP:
        os.environ["GLOO_SOCKET_IFNAME"] = job.interface
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{job.addresses[0]}",
            world_size=len(job.addresses),
            rank=job.index,
        )
        parallel = nn.parallel.DistributedDataParallel(model)
        stopwatch = train(job, parallel, shape)
        torch.distributed.destroy_process_group()
    else:
        raise ValueError(f"No such strategy: {job.strategy!r}")
    answer(job, Result(stopwatch.ms_per_step), stopwatch.weights)


if __name__ == "__main__":
    work(told())
    # Torn down, gloo sometimes ends the process with SIGABRT.
    os._exit(0)
