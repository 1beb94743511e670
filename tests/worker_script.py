"""What a worker of the tests runs: one of the functions below, by name.

Not a test. `workers.py` starts it.
"""

import json
import os
import signal
import sys
import traceback


def cases(names, devices_per_worker=1):
    """Trains the cases one after the other, in one process."""
    import keras
    import worker_cases

    import keras_allreduce

    keras_allreduce.host_devices(devices_per_worker)
    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(timeout_seconds=60)
    found = {}
    for name in names:
        try:
            found[name] = worker_cases.run(name, strategy)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        keras.utils.clear_session(free_memory=False)
    return found


def fit_and_signal(name, index, timeout_seconds):
    """Trains until worker `index` gets a signal in the middle of an epoch."""
    import keras
    import worker_cases

    import keras_allreduce

    class Signal(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 5 and worker_cases.worker_index() == index:
                os.kill(os.getpid(), getattr(signal, name))
            elif batch == 5:
                print("the other worker is gone", flush=True)

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=timeout_seconds
    )
    with strategy.scope():
        model = worker_cases.dense()
        model.compile("sgd", "mse")
    model.fit(
        worker_cases.X,
        worker_cases.TARGET,
        batch_size=4,
        epochs=1000,
        verbose=0,
        callbacks=[Signal()],
    )


def fit_with_other_lengths(timeout_seconds):
    """Trains on four batches on the chief and on two on the other worker."""
    import tensorflow as tf
    import worker_cases

    import keras_allreduce

    strategy = keras_allreduce.MultiWorkerAllReduceStrategy(
        timeout_seconds=timeout_seconds
    )
    with strategy.scope():
        model = worker_cases.dense()
        model.compile("sgd", "mse")
    samples = [32, 16][worker_cases.worker_index()]
    data = tf.data.Dataset.from_tensor_slices(
        (worker_cases.X[:samples], worker_cases.TARGET[:samples])
    )
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    model.fit(data.batch(8).with_options(options), verbose=0)


if __name__ == "__main__":
    call, path, seconds = sys.argv[1:]
    signal.alarm(int(seconds))
    function, *arguments = json.loads(call)
    result = globals()[function](*arguments)
    with open(path, "w") as file:
        json.dump(result, file)
