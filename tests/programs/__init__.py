"""Programs that train on N replicas or workers as on one: see `table.py`.

Not a test. Each module holds those of one subject; this one is what tests need
of them.
"""

from programs import (  # noqa: F401
    batch_losses,
    batches,
    custom_steps,
    gradients,
    layers,
    losses,
    metrics,
    ways,
)
from programs.custom_steps import Custom, Keeps  # noqa: F401
from programs.data import (  # noqa: F401
    SIZE,
    X,
    Y,
    dense,
    fit,
    mean_squared,
    sgd,
    sum_squared,
)
from programs.here import is_worker, worker_index  # noqa: F401
from programs.table import (  # noqa: F401
    COMPARING,
    PROGRAMS,
    agree,
    agree_on_workers,
    on_one_device,
    programs_on,
    run,
)
