"""Programs about what looks at gradients: clipping, averages, loss scales."""

import keras

from programs.data import SIZE, TOKENS, X, Y, dense, fit, of_tokens, sgd
from programs.table import program


@program(on="workers", feature="`clipnorm`", nightly="replicas workers")
def clipnorm():
    return fit(dense(), optimizer=sgd(0.3, clipnorm=0.05))


@program(feature="`global_clipnorm`")
def global_clipnorm():
    return fit(dense(), optimizer=sgd(0.3, global_clipnorm=0.05))


@program(replicas=(), feature="`clipvalue`")
def clipvalue():
    return fit(dense(), optimizer=sgd(0.3, clipvalue=0.02))


def embedding_trained_with(optimizer):
    model = of_tokens(keras.layers.Flatten())
    return fit(model, TOKENS, optimizer=optimizer)


@program(fast=True)
def clipvalue_with_embedding():
    return embedding_trained_with(sgd(0.3, clipvalue=0.02))


@program(
    on="threads workers mpi",
    nightly="mpi",
    feature="`gradient_accumulation_steps`",
    fast=True,
)
def gradient_accumulation():
    optimizer = sgd(0.3, gradient_accumulation_steps=2, clipnorm=0.05)
    return fit(dense(), optimizer=optimizer)


@program
def gradient_accumulation_with_embedding():
    return embedding_trained_with(sgd(0.3, gradient_accumulation_steps=2))


@program(nightly="replicas")
def gradient_accumulation_in_several_steps_per_execution():
    return fit(
        dense(),
        optimizer=sgd(0.1, gradient_accumulation_steps=2),
        steps_per_execution=2,
        samples=48,
        batch_size=12,
    )


@program(replicas=(), feature="`use_ema`")
def ema():
    return fit(dense(), optimizer=sgd(0.1, use_ema=True, ema_momentum=0.8))


@program(feature="`ema_overwrite_frequency`", nightly="replicas")
def ema_overwrite_frequency():
    averages = {"use_ema": True, "ema_momentum": 0.8}
    optimizer = sgd(0.1, **averages, ema_overwrite_frequency=2)
    return fit(dense(), optimizer=optimizer)


def scaled(inner, **arguments):
    arguments = {"initial_scale": 2.0**10} | arguments
    return keras.optimizers.LossScaleOptimizer(inner, **arguments)


@program(nightly="replicas")
def loss_scale():
    optimizer = scaled(sgd(0.1), dynamic_growth_steps=3)
    return fit(dense(), optimizer=optimizer)


@program(on="threads")
def loss_scale_with_an_overflow_on_the_last_replica():
    x = X.copy()
    x[2 * SIZE.batch - 1] = 3e38  # The last sample of the second batch.
    optimizer = scaled(sgd(0.1, clipnorm=0.1))
    return fit(dense(keras.layers.Dense(3)), x, optimizer=optimizer)


@program(nightly="replicas")
def loss_scale_with_accumulation():
    optimizer = scaled(sgd(0.1, gradient_accumulation_steps=2))
    return fit(dense(), optimizer=optimizer)


def in_float16(y):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return fit(dense(), y=y, optimizer=scaled(sgd(0.01)))
    finally:
        keras.config.set_dtype_policy("float32")


@program(tolerance=2e-3, feature="`mixed_float16`")
def mixed_float16():
    return in_float16(Y)


@program(
    replicas=(),
    tolerance=1e-3,
    feature="`mixed_float16`, overflow on the last replica",
)
def mixed_float16_with_an_overflow():
    y = Y.copy()
    y[2 * SIZE.batch - 1] = 3000.0
    return in_float16(y)


@program(tolerance=1e-5, feature="`AdamW`")
def adamw():
    return fit(dense(), optimizer=keras.optimizers.AdamW(0.01))


@program(feature="Learning rate schedule, momentum", nightly="replicas")
def learning_rate_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    return fit(dense(), optimizer=sgd(schedule, momentum=0.9))


@program(nightly="replicas")
def constraint():
    return fit(dense(keras.layers.Dense(4, kernel_constraint="non_neg")))
