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
    return {"weights": weights_of_all_replicas(model), "history": history}


def weights_of_all_replicas(model):
    """The weights of a model, which all replicas must have alike."""
    for weight in model.weights:
        first, *others = getattr(weight.value, "values", [weight.value])
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=weight.path)
    return model.get_weights()


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


class Compiled(keras.layers.Layer):
    """XLA compiles what each replica does in it."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(8, "tanh")

    def build(self, shape):
        self.dense.build(shape)

    @tf.function(jit_compile=True)
    def call(self, x):
        return self.dense(x)


@program
def layer_that_xla_compiles():
    return fit(dense(Compiled()))


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


class Smallest(Largest):
    """The smallest target; it starts from infinity."""

    def __init__(self, name="smallest"):
        super().__init__(name)
        self.reset_state()

    def reset_state(self):
        self.value.assign(np.inf)

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.value.assign(ops.minimum(self.value, ops.min(y_true)))


@program
def metric_that_is_a_minimum():
    return fit(dense(), metrics=[Smallest()], epochs=2)


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


class StartsFrom(Custom):
    """Backprop starts from values that the step gives."""

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            errors = tf.square(self.loss_of(self, x, y))
        size = ops.cast(ops.shape(x)[0], "float32")
        start = tf.where(errors > 0.5, 1.0, 0.1) / size
        return ops.mean(errors), tape.gradient(
            errors, self.trainable_variables, output_gradients=start
        )


@program
def output_gradients_that_a_step_gives():
    return fit(StartsFrom(lambda model, x, y: y - model(x)))


class Totals(Custom):
    """Adds up a sum and a mean of each batch in Keras's own metrics."""

    def __init__(self):
        super().__init__()
        self.of_sums = keras.metrics.Sum("of_sums")
        self.of_means = keras.metrics.Sum("of_means")

    @property
    def metrics(self):
        return [self.of_sums, self.of_means]

    def train_step(self, data):
        super().train_step(data)
        self.of_sums.update_state(ops.sum(ops.abs(data[1])))
        self.of_means.update_state(ops.mean(ops.abs(data[1])))
        return {metric.name: metric.result() for metric in self.metrics}


@program
def sums_over_batches_of_a_sum_and_of_a_mean():
    return fit(Totals(), epochs=2)


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
    """No `call`, no targets, two optimizers in a dict, and metrics."""

    def __init__(self):
        super().__init__()
        makes = keras.Sequential([keras.Input([3]), keras.layers.Dense(6)])
        self.parts = {"makes": makes, "judges": dense()}
        self.shown = {name: keras.metrics.Mean(name) for name in self.parts}

    def compile(self):
        super().compile()
        self.own = {"makes": sgd(0.1), "judges": sgd(0.1, clipnorm=0.2)}

    @property
    def metrics(self):
        return list(self.shown.values())

    def loss_of(self, name, x):
        made = self.parts["makes"](x[:, :3] / 2)
        both = made if name == "makes" else ops.concatenate([made, x])
        wanted = ops.zeros([ops.shape(x)[0], 1])
        if name == "judges":
            wanted = ops.concatenate([wanted + 1, wanted])
        judged = self.parts["judges"](both)
        return ops.mean(ops.softplus(judged) - wanted * judged)

    def train_step(self, x):
        for name in ("judges", "makes"):
            weights = self.parts[name].trainable_weights
            with tf.GradientTape() as tape:
                loss = self.loss_of(name, x)
            self.own[name].apply(tape.gradient(loss, weights), weights)
            self.shown[name].update_state(loss)
        return {name: metric.result() for name, metric in self.shown.items()}


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


# State that layers and steps keep ---------------------------------------------


class Counts(keras.layers.Layer):
    """Counts samples and steps, and keeps an average and a sum."""

    def __init__(self):
        super().__init__()
        arguments = {"initializer": "zeros", "trainable": False}
        self.samples = self.add_weight(dtype="int32", **arguments)
        self.steps = self.add_weight(dtype="int32", **arguments)
        self.seen = self.add_weight(**arguments)
        self.average = self.add_weight(shape=[6], **arguments)
        self.total = self.add_weight(shape=[6], **arguments)

    def call(self, x, training=None):
        if training:
            size = ops.shape(x)[0]
            self.samples.assign_add(size)
            self.steps.assign(self.steps + 1)
            self.seen.assign_add(ops.cast(size, "float32"))
            self.average.assign(0.9 * self.average + 0.1 * ops.mean(x, axis=0))
            self.total.assign(self.total + 0.01 * ops.sum(x, axis=0))
        return x


@program
def state_that_a_layer_keeps():
    return fit(dense(Counts()), epochs=2)


@program
def state_that_a_layer_keeps_in_a_custom_step():
    model = Custom()
    model.hidden = keras.Sequential([Counts(), model.hidden])
    return fit(model, epochs=2)


class KeepsVariables(Custom):
    """Keeps state in TensorFlow's variables, which Keras does not track."""

    def __init__(self):
        super().__init__()
        self.samples = tf.Variable(0, trainable=False)
        self.sums = tf.Variable(tf.zeros([6]), trainable=False)

    def train_step(self, data):
        self.samples.assign_add(tf.shape(data[0])[0])
        added = tf.reduce_sum(data[0], axis=0)
        tf.cond(
            tf.reduce_sum(added) > -1e9,
            lambda: self.sums.assign_add(added),
            lambda: self.sums.assign_add(0 * added),
        )
        return super().train_step(data)


@program
def state_in_variables_of_tensorflow():
    model = KeepsVariables()
    found = fit(model)
    return found | {"kept": [model.samples.numpy(), model.sums.numpy()]}


# Updates without a tape, or without `Optimizer.apply` -------------------------


class ByHand(keras.Sequential):
    """A linear model that computes its gradient itself."""

    def __init__(self, update, is_sum=False):
        super().__init__(
            [keras.Input([6]), keras.layers.Dense(1, use_bias=False)]
        )
        self.update = update
        self.is_sum = is_sum

    def train_step(self, data):
        x, y = data
        (kernel,) = self.trainable_variables
        error = ops.matmul(x, kernel) - y
        gradient = 2 * ops.matmul(ops.transpose(x), error)
        if not self.is_sum:
            gradient = gradient / ops.cast(ops.shape(x)[0], "float32")
        self.update(self, gradient, kernel)
        return {"own": ops.mean(ops.square(error))}


@program
def gradient_by_hand():
    def update(model, gradient, kernel):
        model.optimizer.apply([gradient], [kernel])

    return fit(ByHand(update), optimizer=sgd(0.1, clipnorm=0.5))


@program
def gradient_by_hand_that_is_a_sum():
    def update(model, gradient, kernel):
        model.optimizer.apply_gradients([(gradient, kernel)])

    return fit(ByHand(update, is_sum=True), optimizer=sgd(0.01, momentum=0.9))


@program
def weights_that_a_step_updates_itself():
    def update(model, gradient, kernel):
        kernel.assign_sub(0.1 * gradient)

    return fit(ByHand(update))


@program
def weights_that_a_step_updates_by_a_sum():
    def update(model, gradient, kernel):
        kernel.assign(kernel - 0.01 * gradient)

    return fit(ByHand(update, is_sum=True))


@program
def step_of_an_optimizer_that_is_called_itself():
    def update(model, gradient, kernel):
        model.optimizer.update_step(gradient, kernel, 0.1)

    optimizer = sgd(momentum=0.9)
    model = ByHand(update)
    optimizer.build(model.trainable_variables)
    return fit(model, optimizer=optimizer)


class Overrides(keras.optimizers.SGD):
    """Overrides `apply`, and does not call Keras's."""

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_sub(0.1 * ops.clip(gradient, -0.2, 0.2))


@program
def optimizer_that_overrides_apply():
    return fit(dense(), optimizer=Overrides())


@program
def optimizer_that_overrides_apply_in_a_custom_step():
    optimizer = Overrides()

    def update(model, gradient, kernel):
        optimizer.apply([gradient], [kernel])

    return fit(ByHand(update))


@program
def optimizer_that_overrides_apply_gradients():
    class Own(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            for gradient, variable in grads_and_vars:
                variable.assign_sub(0.1 * gradient)

    def update(model, gradient, kernel):
        model.optimizer.apply_gradients([(gradient, kernel)])

    return fit(ByHand(update), optimizer=Own())


class Momentum(tf.Module):
    """An optimizer that is no optimizer of Keras's."""

    def __init__(self):
        super().__init__()
        self.slot = tf.Variable(tf.zeros([6, 1]), trainable=False)

    def apply(self, gradient, variable):
        self.slot.assign(0.9 * self.slot + gradient)
        variable.assign_sub(0.05 * self.slot)


@program
def optimizer_that_is_a_module():
    own = Momentum()
    return fit(ByHand(lambda model, *pair: own.apply(*pair)))


@program
def optimizer_that_is_a_module_and_a_tape():
    own = Momentum()

    class Model(Custom):
        def train_step(self, data):
            loss, gradients = self.gradients(*data[:2])
            own.slot.assign(0.9 * own.slot + gradients[2][:6])
            self.out.kernel.assign(
                self.out.kernel
                - 0.05 * tf.concat([own.slot, gradients[2][6:]], axis=0)
            )
            return {"own": loss}

    return fit(Model())


# Losses that compare samples ------------------------------------------------


@program
def dice():
    layer = keras.layers.Dense(3, "sigmoid")
    model = keras.Sequential([keras.Input([6]), layer])
    return fit(model, y=(X[:, :3] > 0).astype("float32"), loss="dice")


def in_batch_negatives(y_true, y_pred):
    scores = ops.matmul(ops.normalize(y_pred), ops.transpose(y_true))
    return keras.losses.sparse_categorical_crossentropy(
        ops.arange(ops.shape(y_pred)[0]), scores, from_logits=True
    )


@program
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
