"""Programs that know nothing of replicas, for `test_programs.py` and others.

Not a test. Each is a function that trains and returns a dict of what has to be
as on one device. Batches of 13 samples and a last one of 1.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops

RNG = np.random.default_rng(0)
X = RNG.normal(size=(27, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 1))).astype("float32")
TOKENS = RNG.integers(1, 20, (27, 5))
# More of the first samples is masked than of the others.
TOKENS[:8, 1:] = 0
TOKENS[8:14, 3:] = 0
WEIGHTS = RNG.uniform(0.2, 2, (27, 5)).astype("float32")

PROGRAMS = {}
COMPARING = {}


def program(function):
    PROGRAMS[function.__name__] = function
    return function


def comparing(function):
    """Its loss compares samples of a batch with each other."""
    COMPARING[function.__name__] = function
    return function


def sgd(rate=0.05, **arguments):
    return keras.optimizers.SGD(rate, **arguments)


def fit(model, x=X, y=Y, loss="mse", optimizer=None, **arguments):
    """Compiles and fits; `arguments` go to `fit`, or to `compile`."""
    of_fit = {
        name: arguments.pop(name)
        for name in ("sample_weight", "epochs", "batch_size")
        if name in arguments
    }
    model.compile(optimizer or sgd(), loss, **arguments)
    if not isinstance(x, tf.data.Dataset):
        of_fit = {"y": y, "batch_size": 13} | of_fit
    history = model.fit(x, shuffle=False, verbose=0, **of_fit).history
    return {"weights": model.get_weights(), "history": history}


def dense(*layers):
    return keras.Sequential([keras.Input([6]), *layers, keras.layers.Dense(1)])


def mean_squared(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


def sum_squared(y_true, y_pred):
    return ops.sum(ops.square(y_true - y_pred))


# Losses that Keras takes ----------------------------------------------------


@program
def loss_of_one_value_that_is_a_mean():
    return fit(dense(), loss=mean_squared)


@program
def loss_of_one_value_that_is_a_sum():
    return fit(dense(), loss=sum_squared, optimizer=sgd(0.003))


@program
def loss_that_is_not_reduced():
    loss = keras.losses.MeanSquaredError(reduction=None)
    return fit(dense(), loss=loss, optimizer=sgd(0.003))


@program
def losses_that_are_reduced_in_different_ways():
    inputs = keras.Input([6])
    heads = [keras.layers.Dense(1, name=name)(inputs) for name in "ab"]
    losses = [
        keras.losses.MeanSquaredError(),
        keras.losses.MeanSquaredError(reduction="sum"),
    ]
    return fit(
        keras.Model(inputs, heads), y=[Y, Y], loss=losses, optimizer=sgd(0.003)
    )


@program
def losses_that_know_their_own_output_only():
    def box(y_true, y_pred):
        left, right = ops.split(y_true - y_pred, 2, axis=-1)
        return ops.sum(ops.abs(left) + ops.abs(right), axis=-1)

    inputs = keras.Input([6])
    heads = {
        "box": keras.layers.Dense(4, name="box")(inputs),
        "value": keras.layers.Dense(1, name="value")(inputs),
    }
    return fit(
        keras.Model(inputs, heads),
        y={"box": X[:, :4], "value": Y},
        loss={"box": box, "value": mean_squared},
    )


def of_tokens():
    return keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            keras.layers.Embedding(20, 3, mask_zero=True),
            keras.layers.Dense(1),
        ]
    )


@program
def masked_loss():
    return fit(of_tokens(), TOKENS, TOKENS[..., None] / 20)


@program
def masked_loss_with_weights():
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    return fit(
        of_tokens(),
        TOKENS,
        TOKENS[..., None] / 20,
        loss=loss,
        sample_weight=WEIGHTS,
    )


class Adds(keras.layers.Layer):
    """Adds a loss."""

    def __init__(self, loss_of):
        super().__init__()
        self.loss_of = loss_of

    def call(self, x):
        self.add_loss(self.loss_of(x))
        return x


@program
def added_mean():
    return fit(dense(Adds(lambda x: ops.mean(ops.square(x)))))


@program
def added_sum():
    layer = keras.layers.Dense(3, kernel_regularizer="l2")
    added = Adds(lambda x: 1e-2 * ops.sum(ops.square(x)))
    return fit(dense(layer, added))


@program
def added_vector():
    return fit(dense(Adds(lambda x: 1e-2 * ops.sum(ops.square(x), axis=-1))))


@program
def added_loss_of_an_object():
    distance = keras.losses.MeanSquaredError()
    return fit(dense(Adds(lambda x: distance(x, x / 2))))


@program
def activity_regularizer():
    return fit(dense(keras.layers.ActivityRegularization(l2=0.01)))


@program
def metric_of_one_value():
    return fit(dense(), metrics=[lambda y, p: ops.mean(ops.abs(y - p))])


class Largest(keras.metrics.Metric):
    """The largest target; its state is not a sum."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(y_true)))

    def result(self):
        return self.value * 1.0


@program
def metric_that_is_a_maximum():
    return fit(dense(), metrics=[Largest()], epochs=2)


# Custom steps ---------------------------------------------------------------


class Custom(keras.Model):
    """A custom `train_step` that differentiates `loss_of`."""

    def __init__(self, loss_of=None):
        super().__init__()
        self.hidden = keras.layers.Dense(8, "tanh")
        self.out = keras.layers.Dense(1)
        self.loss_of = loss_of or (
            lambda model, x, y: mean_squared(y, model(x, training=True))
        )

    def call(self, x, training=None):
        return self.out(self.hidden(x))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.loss_of(self, x, y)
        return loss, tape.gradient(loss, self.trainable_variables)

    def train_step(self, data):
        loss, gradients = self.gradients(*data[:2])
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss}


@program
def plain_mean():
    return fit(Custom())


@program
def plain_sum():
    def loss_of(model, x, y):
        return sum_squared(y, model(x))

    return fit(Custom(loss_of), optimizer=sgd(0.003))


@program
def mean_over_a_constant_batch():
    def loss_of(model, x, y):
        losses = tf.reduce_mean(tf.square(y - model(x)), axis=-1)
        return tf.nn.compute_average_loss(losses, global_batch_size=13)

    return fit(Custom(loss_of))


@program
def mean_divided_by_the_replicas():
    def loss_of(model, x, y):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return mean_squared(y, model(x)) / replicas

    return fit(Custom(loss_of))


@program
def computed_loss():
    return fit(Custom(lambda model, x, y: model.compute_loss(x, y, model(x))))


@program
def computed_loss_that_is_a_sum():
    return fit(
        Custom(lambda model, x, y: model.compute_loss(x, y, model(x))),
        loss=keras.losses.MeanSquaredError(reduction="sum"),
        optimizer=sgd(0.003),
    )


class CustomLoss(keras.Sequential):
    """A custom `compute_loss`."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return sum_squared(y, y_pred)


@program
def custom_compute_loss():
    model = CustomLoss([keras.Input([6]), keras.layers.Dense(1)])
    return fit(model, optimizer=sgd(0.003), metrics=["mae"])


class Clips(Custom):
    def train_step(self, data):
        loss, gradients = self.gradients(*data[:2])
        gradients, norm = tf.clip_by_global_norm(gradients, 0.3)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss, "norm": norm}


@program
def clips_gradients_itself():
    return fit(Clips())


@program
def optimizer_that_clips():
    return fit(Custom(), optimizer=sgd(0.3, clipnorm=0.1))


@program
def optimizer_that_accumulates():
    optimizer = sgd(0.3, gradient_accumulation_steps=2)
    return fit(Custom(), optimizer=optimizer)


class Scales(Custom):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(self, x, y)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss}


@program
def optimizer_that_scales_the_loss():
    optimizer = keras.optimizers.LossScaleOptimizer(
        sgd(0.1), initial_scale=2.0**10
    )
    return fit(Scales(), optimizer=optimizer)


class UpdatesItself(Custom):
    def train_step(self, data):
        loss, gradients = self.gradients(*data[:2])
        for variable, gradient in zip(
            self.trainable_variables, gradients, strict=True
        ):
            variable.assign(variable - 0.05 * gradient)
        return {"own": loss}


@program
def no_optimizer():
    return fit(UpdatesItself())


def logged(method):
    """A decorator that hides what it decorates."""

    def wrapper(*arguments):
        return method(*arguments)

    return wrapper


class Decorated(Custom):
    @logged
    def train_step(self, data):
        return Custom.train_step(self, data)


@program
def decorated_step():
    return fit(Decorated())


class Functions(Custom):
    @tf.function
    def train_step(self, data):
        x, y = data
        # Only autograph can run this on tensors.
        if tf.reduce_sum(x) > 1e9:
            y = y + 1.0
        return self.inner_step(x, y)

    @tf.function
    def inner_step(self, x, y):
        loss, gradients = self.gradients(x, y)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss}


@program
def steps_that_are_tf_functions():
    return fit(Functions(), optimizer=sgd(0.1, clipnorm=0.1))


class Adversaries(keras.Model):
    """No `call`, no targets, two optimizers in a dict."""

    def __init__(self):
        super().__init__()
        self.generator = keras.Sequential(
            [keras.Input([3]), keras.layers.Dense(6)]
        )
        self.critic = keras.Sequential(
            [
                keras.Input([6]),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dense(1),
            ]
        )
        self.shown = [keras.metrics.Mean(name=name) for name in "gc"]

    def compile(self):
        super().compile()
        self.own = {"generator": sgd(0.1), "critic": sgd(0.1, clipnorm=0.2)}

    @property
    def metrics(self):
        return self.shown

    def update(self, name, loss_of):
        weights = getattr(self, name).trainable_weights
        with tf.GradientTape() as tape:
            loss = loss_of()
        gradients = tape.gradient(loss, weights)
        self.own[name].apply_gradients(zip(gradients, weights, strict=True))
        return loss

    def train_step(self, x):
        entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        code, ones = x[:, :3] / 2, tf.ones([tf.shape(x)[0], 1])
        both = tf.concat([self.generator(code), x], axis=0)
        labels = tf.concat([ones, 0 * ones], axis=0)
        losses = (
            self.update("critic", lambda: entropy(labels, self.critic(both))),
            self.update(
                "generator",
                lambda: entropy(0 * ones, self.critic(self.generator(code))),
            ),
        )
        for metric, loss in zip(self.shown, losses, strict=True):
            metric.update_state(loss)
        return {metric.name: metric.result() for metric in self.shown}


@program
def adversaries():
    model = Adversaries()
    model.compile()
    history = model.fit(X, batch_size=13, shuffle=False, verbose=0).history
    return {"weights": model.get_weights(), "history": history}


class Keeps(Custom):
    """Assigns to weights of its own: a teacher, a counter, an average."""

    def __init__(self):
        super().__init__()
        self.teacher = keras.Sequential([keras.Input([6]), self.twin()])
        self.teacher.trainable = False
        self.count = self.add_weight(initializer="zeros", trainable=False)
        self.average = self.add_weight(
            shape=[6], initializer="zeros", trainable=False
        )

    def twin(self):
        return keras.layers.Dense(8, "tanh")

    def train_step(self, data):
        logs = super().train_step(data)
        for slow, fast in zip(
            self.teacher.weights, self.hidden.weights, strict=True
        ):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.count.assign(self.count + 1.0)
        self.average.assign(
            0.9 * self.average + 0.1 * ops.mean(data[0], axis=0)
        )
        return logs


@program
def state_that_a_step_keeps():
    return fit(Keeps())


# Losses that compare samples ------------------------------------------------


@comparing
def dice():
    layer = keras.layers.Dense(3, "sigmoid")
    model = keras.Sequential([keras.Input([6]), layer])
    return fit(model, y=(X[:, :3] > 0).astype("float32"), loss="dice")


def in_batch_negatives(y_true, y_pred):
    scores = ops.matmul(ops.normalize(y_pred), ops.transpose(y_true))
    return keras.losses.sparse_categorical_crossentropy(
        ops.arange(ops.shape(y_pred)[0]), scores, from_logits=True
    )


@comparing
def negatives_in_a_loss():
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(6)])
    return fit(model, y=X, loss=in_batch_negatives)


@comparing
def negatives_in_a_step():
    def loss_of(model, x, y):
        return ops.mean(in_batch_negatives(y, model.hidden(x)))

    return fit(Custom(loss_of), y=RNG.normal(size=(27, 8)).astype("float32"))


@comparing
def a_sum_and_a_mean_in_a_step():
    def loss_of(model, x, y):
        y_pred = model(x)
        return mean_squared(y, y_pred) + 0.1 * sum_squared(y, y_pred)

    return fit(Custom(loss_of), optimizer=sgd(0.01))
