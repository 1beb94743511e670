"""What a worker of the tests runs: one of the functions below, by name.

Not a test. `workers.py` starts it.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.append(str(Path(__file__).parents[1]))
import programs
from deadlines import DEADLINE_SECONDS, PATIENCE_SECONDS

import keras_allreduce


def made(**options):
    """The strategy of this worker."""
    return keras_allreduce.MultiWorkerAllReduceStrategy(
        **{"timeout_seconds": DEADLINE_SECONDS} | options
    )


def compiled(strategy):
    """A small model under a strategy."""
    with strategy.scope():
        model = programs.dense()
        model.compile("sgd", "mse")
    return model


class AtBatch(keras.callbacks.Callback):
    """One worker acts when a batch has ended; the others may say so."""

    def __init__(self, batch, index, act, others_say=""):
        super().__init__()
        self.batch, self.index = batch, index
        self.act, self.others_say = act, others_say

    def on_train_batch_end(self, batch, logs=None):
        if batch != self.batch:
            return
        if programs.worker_index() == self.index:
            self.act(self.model)
        elif self.others_say:
            print(self.others_say, flush=True)


def cases(names):
    """Trains the cases one after the other, on one device per worker."""
    return _run(
        names,
        made(),
    )


def cases_on_two_devices_each(names):
    """The same, and the cluster is an argument, not in the environment."""
    keras_allreduce.host_devices(2)
    if "TF_CONFIG" not in os.environ:  # MPI tells who the workers are.
        return _run(
            names,
            made(),
        )
    config = json.loads(os.environ.pop("TF_CONFIG"))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(config["cluster"]),
        task_type=config["task"]["type"],
        task_id=config["task"]["index"],
        rpc_layer="grpc",
    )
    return _run(
        names,
        made(cluster_resolver=resolver),
    )


def cases_on_the_wire(names, wire_dtype):
    """The same as `cases`, with gradients that cross in `wire_dtype`."""
    return _run(
        names,
        made(wire_dtype=wire_dtype),
    )


def sums(wire_dtypes):
    """Sums of `toy_wire_format.parts`, by wire dtype and name."""
    import toy_wire_format

    from keras_allreduce.workers.collectives import CollectiveGroup
    from keras_allreduce.workers.wire import Wire
    from keras_allreduce.workers.wire_formats import WIRE_FORMATS

    WIRE_FORMATS[toy_wire_format.NAME] = toy_wire_format.ScaledFloat16()
    strategy = made()
    workers = strategy.extended.num_workers
    device = strategy.extended.worker_devices[0]
    found = {}
    for dtype in wire_dtypes:
        group = CollectiveGroup(workers, device)
        wire = Wire(
            _collectives(group),
            workers,
            WIRE_FORMATS["exact" if dtype == "float32" else dtype],
        )
        parts = toy_wire_format.parts(programs.worker_index())
        parts = {name: tf.constant(part) for name, part in parts.items()}

        @tf.function(autograph=False)
        def all_reduce(parts, wire=wire):
            return {n: wire.all_reduce(p, n) for n, p in parts.items()}

        @tf.function(
            input_signature=[tf.TensorSpec([None, None], tf.float32)],
            autograph=False,
        )
        def of_any_shape(part, wire=wire):
            return wire.all_reduce(part, "of any shape")

        results = all_reduce(parts)
        results["of any shape"] = of_any_shape(parts["large"])
        found[dtype] = {
            name: {
                "dtype": result.dtype.name,
                "values": result.numpy().tolist(),
            }
            for name, result in results.items()
        }
    return found


def _collectives(group):
    """Collectives between the logical CPU devices, over MPI if it is there."""
    from keras_allreduce.workers.collectives import Collectives
    from keras_allreduce.workers.in_flight import InFlight
    from keras_allreduce.workers.mpi.collectives import MpiCollectives

    if "TF_CONFIG" in os.environ:
        return Collectives(group, InFlight())
    return MpiCollectives(_engine(), group, InFlight())


def _engine():
    from mpi4py import MPI

    from keras_allreduce.workers.mpi.engine import Engine

    return Engine(MPI, MPI.COMM_WORLD.Dup(), print)


def run_collectives_of_mpi():
    """Every collective of `messages.py`, each in another order on each rank.

    Returns what came back, by name. A collective waits for one that the other
    ranks submit much later, and the second time round for no agreement.
    """
    import threading

    from mpi4py import MPI

    from keras_allreduce.workers.mpi import messages
    from keras_allreduce.workers.mpi.communicators import Submission

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    own = np.arange(4.0) + rank
    what = {
        "all_reduce": own,
        "all_gather": own.astype("float16"),
        "all_to_all": np.stack([own + 10 * w for w in range(size)]),
        "all_gather_rows": np.full([rank, 2], rank, "int64"),
    }
    if size == 2:
        what["swap"] = np.array(rank, "int32")
    engine = _engine()
    found = {}
    for turn in range(2):
        done = threading.Barrier(2)
        names = [f"{kind} {n}" for n in range(20) for kind in what]
        np.random.default_rng(rank + size * turn).shuffle(names)
        received = {}

        def deliver(array, name, received=received, done=done):
            received[name] = array
            if len(received) == 20 * len(what):
                threading.Thread(target=done.wait).start()

        for name in names:
            kind = name.split()[0]
            engine.submit(
                Submission(
                    name,
                    getattr(messages, kind),
                    what[kind],
                    lambda array, name=name: deliver(array, name),
                )
            )
        done.wait(60)
        for name, array in received.items():
            kind = name.split()[0]
            result = {"dtype": array.dtype.name, "values": array.tolist()}
            assert found.setdefault(kind, result) == result, (name, result)
    engine.stop(10)
    return found


def _run(names, strategy):
    found = {}
    for name in names:
        try:
            found[name], _ = programs.run(name, strategy)
        except Exception:  # noqa: BLE001 - The test shows it.
            found[name] = {"error": traceback.format_exc()}
        keras.utils.clear_session(free_memory=False)
    return found


def what_backprop_waits_for():
    """Collectives that the products of a train step wait for, by model."""
    import graph_walk

    strategy = made()
    found = {}
    for name, layers in {
        "dense": [],
        "synchronized": [keras.layers.BatchNormalization(synchronized=True)],
    }.items():
        with strategy.scope():
            model = programs.dense(*layers)
            model.compile("sgd", "mse")

        @tf.function(
            input_signature=[
                tf.TensorSpec([None, 6]),
                tf.TensorSpec([None, 1]),
            ]
        )
        def step(x, y, model=model):
            return strategy.run(model.train_step, args=((x, y),))

        graph = step.get_concrete_function().graph
        products = graph_walk.ops_of_type(graph, "MatMul")
        waits_for = set().union(*map(graph_walk.ancestors, products))
        found[name] = [
            len(products),
            sum(map(_is_collective, waits_for)),
            sum(map(_is_collective, graph.get_operations())),
        ]
    return found


def _is_collective(op):
    """Whether an op sends to other workers, over gRPC or over MPI."""
    return op.type.startswith(("Collective", "PyFunc"))


def fit_with_a_late_worker():
    """Trains; worker 1 computes something else before each step."""

    class Compute(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            end = time.monotonic() + 0.3 * programs.worker_index()
            while time.monotonic() < end:
                pass

    strategy = made(measure_lateness=True)
    with strategy.scope():
        history = programs.fit(
            programs.dense(),
            callbacks=[keras_allreduce.AllReduceLogger(), Compute()],
            batch_size=8,
        )["history"]
    return {name: history[name] for name in ("last_worker", "lateness_ms")}


def show_what_is_sent(path):
    """Plans, explains and trains, with a timeline; worker 1 comes late."""

    class Late(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            time.sleep(0.2 * programs.worker_index())

    strategy = made(
        wire_dtype="bfloat16",
        bytes_per_pack=100,
    )
    model = compiled(strategy)
    explained = []
    planned = strategy.plan(model)
    strategy.explain(model, print_fn=explained.append)
    model.fit(
        programs.X,
        programs.Y,
        batch_size=4,
        epochs=2,
        verbose=0,
        callbacks=[
            Late(),
            keras_allreduce.AllReduceTimeline(path, steps=(2, 5)),
        ],
    )
    steps = strategy.step_log.steps(model)
    return {
        "planned": str(planned),
        "same": [step.plan == planned for step in steps],
        "sent": planned.sent,
        "explained": explained[0],
    }


def fit_and_signal(name, index, timeout_seconds):
    """Trains until worker `index` gets a signal in the middle of an epoch."""
    from keras_allreduce.workers import group

    # Tests need not wait as long as users for one that is only slow.
    group.TIMING = dataclasses.replace(group.TIMING, silent=PATIENCE_SECONDS)

    def send(model):
        os.kill(os.getpid(), getattr(signal, name))

    act = AtBatch(5, index, send, "the other worker is gone")
    _fit(timeout_seconds, act, batch_size=4, epochs=1000)


def fit_and_run_out_of_memory(index):
    """Trains until a step of worker `index` asks for 4 TiB of its device."""

    class Hungry(keras.layers.Layer):
        def build(self, input_shape):
            self.elements = self.add_weight(
                shape=(), initializer="ones", dtype="int64", trainable=False
            )

        def call(self, inputs):
            shape = tf.reshape(self.elements.value, [1])
            return inputs + tf.reduce_sum(tf.fill(shape, 0.0))

    def grow(model):
        model.layers[0].elements.assign(2**40)

    strategy = made()
    with strategy.scope():
        layers = [Hungry(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile("sgd", "mse")
    model.fit(
        programs.X,
        programs.Y,
        batch_size=4,
        verbose=0,
        callbacks=[
            AtBatch(5, index, grow, "the other worker is out of memory")
        ],
    )


def reports():
    """A callback that says when an epoch has ended."""
    return keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: print("an epoch has ended", flush=True)
    )


def fit_until_ended(timeout_seconds):
    """Trains without an end; says when an epoch has ended."""

    _fit(timeout_seconds, reports(), batch_size=4, epochs=10**6)


def fit_epochs(epochs):
    """Trains; says when an epoch has ended."""
    from keras_allreduce.workers import group

    # Else a test would have to suspend the workers for as long as users do.
    group.TIMING = dataclasses.replace(group.TIMING, silent=PATIENCE_SECONDS)

    _fit(DEADLINE_SECONDS, reports(), batch_size=4, epochs=epochs)
    return True


def fit_large_gradients(width, epochs):
    """Trains a kernel of `width` KB; returns its sum and the loss."""
    strategy = made()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        layers = [
            keras.layers.Dense(width, use_bias=False),
            keras.layers.Dense(1, use_bias=False),
        ]
        model = keras.Sequential([keras.Input([250]), *layers])
        model.compile(keras.optimizers.SGD(1e-4), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=[12, 250]).astype("float32")
    history = model.fit(x, x[:, :1], batch_size=6, epochs=epochs, verbose=0)
    kernel = np.asarray(model.layers[0].kernel, "float64")
    return [kernel.sum(), history.history["loss"][-1]]


def fit_clipped(epochs):
    """Trains with a norm over a million numbers; returns sums of weights."""
    strategy = made()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        layers = [
            keras.layers.Dense(1500, activation="relu"),
            keras.layers.Dense(700, activation="tanh"),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential([keras.Input([400]), *layers])
        model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=0.5), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=[64, 400]).astype("float32")
    model.fit(x, x[:, :1], batch_size=32, epochs=epochs, verbose=0)
    return [float(np.asarray(w, "float64").sum()) for w in model.get_weights()]


def use_two_strategies():
    """Trains under two strategies in turns, beginning with the first again."""
    models = []
    for optimizer in ("sgd", "adam"):
        strategy = made()
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = programs.dense()
            model.compile(optimizer, "mse")
        models.append((strategy, model))
        _losses(model)
    losses = [_losses(model) for _, model in models]
    for strategy, _ in models:
        with strategy.scope():
            another = programs.dense()
            another.compile("sgd", "mse")
        losses.append(_losses(another))
    return losses


def _losses(model):
    """Loss of an epoch with validation, and of `evaluate` after it."""
    data = programs.X, programs.Y
    history = model.fit(
        *data, batch_size=22, validation_data=data, verbose=0
    ).history
    after = model.evaluate(*data, batch_size=22, verbose=0)
    return [history["loss"][0], history["val_loss"][0], after]


def fit_with_other_lengths(steps_per_epoch):
    """Trains on four batches on the chief and on two on the other worker."""
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    model = compiled(strategy)
    samples = [32, 16][programs.worker_index()]
    data = tf.data.Dataset.from_tensor_slices(
        (programs.X[:samples], programs.Y[:samples])
    )
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    model.fit(
        data.batch(8).with_options(options),
        steps_per_epoch=steps_per_epoch,
        epochs=2,
        verbose=0,
    )
    return [weight.tolist() for weight in model.get_weights()]


def fit_where_nothing_says_which_host_is_the_first():
    """Trains as on several hosts, where mpirun tells ranks and no host."""
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "1"
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        del os.environ[name]
    return cases(["even_batches"])["even_batches"]


def fit_and_raise(index):
    """Trains until worker `index` raises in the middle of an epoch."""

    def fail(model):
        raise KeyError("of the script")

    _fit(60, AtBatch(5, index, fail), batch_size=4, epochs=1000)


def fit_and_exit(index):
    """Trains until worker `index` ends by `sys.exit(3)` in an epoch."""
    act = AtBatch(5, index, lambda model: sys.exit(3))
    _fit(60, act, batch_size=4, epochs=1000)


def fit_and_disconnect(index):
    """Trains; from a batch on, connections to worker `index` break."""

    def start(model):
        threading.Thread(target=_break_connections, daemon=True).start()

    _fit(60, AtBatch(5, index, start), batch_size=4, epochs=1000)


def _break_connections():
    """Resets the connections that others have made, again and again."""
    own = json.loads(os.environ["TF_CONFIG"])
    address = own["cluster"]["worker"][own["task"]["index"]]
    port = int(address.rpartition(":")[2])
    reset = ctypes.CDLL(None).connect  # To nowhere: `AF_UNSPEC`.
    before = set()
    while True:
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                kind = os.readlink(f"/proc/self/fd/{name}")
                if not kind.startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.getsockname()[1] == port:
                        found[connection.getpeername()] = int(name)
        # A question of a heartbeat is over by now.
        for peer in before & set(found):
            reset(found[peer], bytes(16), 16)
        before = set(found)
        time.sleep(0.2)


def fit_and_leave(index):
    """Trains; worker `index` ends its script after the first epoch."""

    class Leave(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if programs.worker_index() == index:
                sys.exit()

    _fit(600, Leave(), epochs=2)


def fit_and_fall_behind(timeout_seconds):
    """Trains; worker 1 sleeps in a callback until it is too late."""
    act = AtBatch(1, 1, lambda model: time.sleep(20 * timeout_seconds))
    _fit(timeout_seconds, act, batch_size=8)


def describe():
    """What a strategy without arguments finds out about its workers."""
    # No MPI has started those that are only told so.
    strategy = made(transport="grpc")
    resolver = strategy.cluster_resolver
    return {
        "resolver": type(resolver).__name__,
        "index": resolver.task_id,
        "workers": strategy.extended.num_workers,
    }


def _fit(timeout_seconds, callback, **options):
    """Trains a small model; `options` are those of `model.fit`."""
    strategy = made(timeout_seconds=timeout_seconds)
    model = compiled(strategy)
    model.fit(
        programs.X,
        programs.Y,
        verbose=0,
        callbacks=[callback],
        **options,
    )


def fit_what_differs(what):
    """Trains; worker 1 differs from the chief in one thing."""
    differs = programs.worker_index() == 1
    if what == "devices" and differs:
        keras_allreduce.host_devices(2)
    strategy = made(
        bytes_per_pack=512 if what == "option" and differs else 1024,
    )
    units = 7 if what == "shape" and differs else 5
    with strategy.scope():
        model = programs.dense(keras.layers.Dense(units))
        model.compile("sgd", "mse")
    model.fit(programs.X, programs.Y, verbose=0)


def die_after_the_meeting(index, timeout_seconds):
    """Worker `index` ends when all have met, before TensorFlow connects."""
    from keras_allreduce.workers import connect

    meet = connect.meet

    def meet_and_die(*arguments):
        meet(*arguments)
        os._exit(3)

    if programs.worker_index() == index:
        connect.meet = meet_and_die
    made(timeout_seconds=timeout_seconds)


def fit_without_coordination():
    """Trains as TensorFlow's own tests do, and with a copy of the strategy."""
    import copy
    import importlib

    # What those tests call, which has no public name.
    context = importlib.import_module("tensorflow.python.eager.context")
    context.context().configure_coordination_service(service_type="")
    strategy = made()
    losses = []
    for each in (strategy, copy.deepcopy(strategy)):
        keras.utils.set_random_seed(3)
        with each.scope():
            fitted = programs.fit(programs.dense(), epochs=2)
        losses.append(fitted["history"]["loss"])
        replicas = tf.constant(each.num_replicas_in_sync)
    return {"losses": losses, "replicas": int(replicas)}


def make_a_variable_after_a_failure():
    """Worker 1 is killed; the chief makes a variable."""
    strategy = made()
    if programs.worker_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    found = []
    # The first is compared, the second sent to the others at once.
    for value in (tf.constant(1.0), 1.0):
        try:
            with strategy.scope():
                tf.Variable(value)
        except tf.errors.UnavailableError as error:
            is_ours = isinstance(error, keras_allreduce.WorkerLostError)
            found.append([is_ours, str(error)])
    return found


def fit_with_a_sigterm_while_connecting(index):
    """Worker `index` gets it while TensorFlow still catches signals."""
    from keras_allreduce.workers import connect

    start = connect._connecting

    @contextlib.contextmanager
    def connecting(*arguments):
        with start(*arguments):
            yield
        os.kill(os.getpid(), signal.SIGTERM)

    if programs.worker_index() == index:
        connect._connecting = connecting
    fit_until_ended(DEADLINE_SECONDS)


def hear_sigterm():
    """Who hears a SIGTERM: handlers from before and after the strategy."""
    import multiprocessing

    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
    made()
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: heard.append("after"))
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = multiprocessing.get_context("fork").Process(
        target=time.sleep, args=(600,)
    )
    child.start()
    child.terminate()
    child.join(60)
    exit_code = child.exitcode
    child.kill()
    return {"heard": heard, "exit_code_of_child": exit_code}


def checkpoint_on_sigterm():
    """Worker 1 is preempted; all save the same step and leave their loop."""

    class LeftError(Exception):
        pass

    def leave():
        raise LeftError

    strategy = made()
    with strategy.scope():
        steps = tf.Variable(0, dtype=tf.int64)

    @tf.function
    def step():
        def add():
            gathered = tf.distribute.get_replica_context().all_reduce(
                "SUM", tf.constant(1.0)
            )
            steps.assign_add(tf.cast(gathered > 1.5, tf.int64))

        strategy.run(add)

    with tempfile.TemporaryDirectory() as folder:
        handler = tf.distribute.experimental.PreemptionCheckpointHandler(
            strategy.cluster_resolver,
            tf.train.Checkpoint(steps=steps),
            folder,
            tf.distribute.experimental.TerminationConfig(exit_fn=leave),
        )
        with contextlib.suppress(LeftError):
            while True:
                if programs.worker_index() == 1 and steps.numpy() == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                handler.run(step)
        saved = None
        if programs.worker_index() == 0:  # The others save elsewhere.
            path = tf.train.latest_checkpoint(folder)
            name = "steps/.ATTRIBUTES/VARIABLE_VALUE"
            saved = int(tf.train.load_checkpoint(path).get_tensor(name))
    return {"steps": int(steps.numpy()), "saved": saved}


def fit_with_processes():
    """Trains on a `PyDataset` with a pool of forked processes, and ends."""

    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            rows = slice(4 * index, 4 * index + 4)
            return programs.X[rows], programs.Y[rows]

    strategy = made()
    model = compiled(strategy)
    model.fit(Data(workers=2, use_multiprocessing=True), epochs=2, verbose=0)
    return bool(np.all(np.isfinite(model.get_weights()[0])))


def start_without(absent, timeout_seconds):
    """Makes a strategy, but worker `absent` does not."""
    if programs.worker_index() != absent:
        made(timeout_seconds=timeout_seconds)


def start_with_a_port_in_use(index, timeout_seconds):
    """Makes a strategy where something listens on the port of a worker."""
    import socket

    config = json.loads(os.environ["TF_CONFIG"])
    _, port = config["cluster"]["worker"][index].split(":")
    with socket.socket() as taken:
        if programs.worker_index() == index:
            taken.bind(("127.0.0.1", int(port)))
            taken.listen()
        made(timeout_seconds=timeout_seconds)


def start_with_other_addresses():
    """Makes a strategy; TF_CONFIG of worker 1 lists one worker more."""
    config = json.loads(os.environ["TF_CONFIG"])
    if programs.worker_index() == 1:
        config["cluster"]["worker"].append("127.0.0.1:1")
    os.environ["TF_CONFIG"] = json.dumps(config)
    made()


def end_one_after_the_other(last):
    """Trains; then all but worker `last` end while it saves and predicts."""
    import socket

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    model = compiled(strategy)
    model.fit(programs.X, programs.Y, verbose=0)
    if programs.worker_index() != last:
        return
    config = json.loads(os.environ["TF_CONFIG"])
    host, port = config["cluster"]["worker"][1 - last].split(":")
    # Not as fast as it can: every connection takes a port for a minute.
    with contextlib.suppress(ConnectionError):
        while True:
            socket.create_connection((host, int(port))).close()
            time.sleep(0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save(os.path.join(folder, "model.keras"))
    model(programs.X)


def sums_between_steps():
    """What the workers sum while a model trains, by what it is for."""
    from keras_allreduce.workers.group import WorkerGroup

    purposes = []
    stock = WorkerGroup.all_reduce

    def noted(self, value, name):
        purposes.append(name)
        return stock(self, value, name)

    WorkerGroup.all_reduce = noted
    strategy = made()
    with strategy.scope():
        model = programs.dense()
        model.compile("sgd", "mse", metrics=["mae", "mse"])
    x, y = programs.X[:20], programs.Y[:20]
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    first, purposes[:] = list(purposes), []
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    return {"first": first, "then": list(purposes)}


def drift_cases(names):
    """Runs cases of `drift_cases.py`, one after the other."""
    import drift_cases

    strategy = made()
    return {name: drift_cases.run(name, strategy) for name in names}


def fit_and_stop_alone(index):
    """Worker `index` stops in the middle of an epoch, the other goes on."""

    def stop(model):
        model.stop_training = True

    _fit(DEADLINE_SECONDS, AtBatch(1, index, stop), batch_size=8, epochs=5)


def predict_alone(index, seconds=0):
    """Worker `index` predicts while, or so long after, the other ends."""
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy()
    model = compiled(strategy)
    keras.utils.set_random_seed(1)
    model.fit(programs.X, programs.Y, verbose=0)
    if programs.worker_index() == index:
        time.sleep(seconds)
        model.predict(programs.X, verbose=0)


if __name__ == "__main__":
    call, path, seconds = sys.argv[1:]
    signal.alarm(int(seconds))
    function, *arguments = json.loads(call)
    result = globals()[function](*arguments)
    # In one piece: `json.dump` is ten times slower.
    text = json.dumps(result)
    with open(path, "w") as file:
        file.write(text)
