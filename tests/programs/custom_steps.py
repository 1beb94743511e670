"""Programs with custom steps: what they differentiate, keep and update."""

import keras
import tensorflow as tf
from keras import ops

from programs.data import (
    RNG,
    SIZE,
    X,
    dense,
    fit,
    mean_squared,
    sgd,
    sum_squared,
    weights_of_all_replicas,
)
from programs.losses import in_batch_negatives, mse
from programs.table import comparing, program


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


@program(
    on="workers",
    logs_of_worker=True,
    fast=True,
    feature="Custom `train_step`, with a plain mean",
    nightly="workers",
)
def plain_mean():
    return fit(Custom())


@program(
    on="threads",
    logs_of_worker=True,
    fast=True,
    feature="Custom `train_step`, with a sum",
)
def plain_sum():
    def loss_of(model, x, y):
        return sum_squared(y, model(x))

    return fit(Custom(loss_of), optimizer=sgd(0.003))


@program(nightly="replicas")
def mean_divided_by_the_replicas():
    def loss_of(model, x, y):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return mean_squared(y, model(x)) / replicas

    return fit(Custom(loss_of))


def cross_replica_concat(tensor, strategy):
    """The rows of all replicas, as SimCLR joins them."""
    if strategy.num_replicas_in_sync <= 1:
        return tensor
    replicas = strategy.num_replicas_in_sync
    context = tf.distribute.get_replica_context()
    parts = tf.scatter_nd(
        [[context.replica_id_in_sync_group]],
        [tensor],
        tf.concat([[replicas], tf.shape(tensor)], axis=0),
    )
    parts = context.all_reduce(tf.distribute.ReduceOp.SUM, parts)
    return tf.reshape(parts, [-1, *parts.shape[2:]])


@program(
    replicas=(2, 3),
    fast=True,
    feature="SimCLR's concat over the replicas, even batches",
)
def joins_the_rows_of_all_replicas():
    strategy = tf.distribute.get_strategy()

    def features(model, x):
        hidden = model.hidden(x)
        joined = tf.concat([hidden, model.out(hidden)], axis=1)
        return tf.math.l2_normalize(joined, axis=1)

    def loss_of(model, x, y):
        one, other = features(model, x), features(model, 0.9 * x + 0.1)
        every = cross_replica_concat(other, strategy)
        count = tf.shape(x)[0]
        context = tf.distribute.get_replica_context()
        labels = tf.range(count) + context.replica_id_in_sync_group * count
        losses = keras.losses.sparse_categorical_crossentropy(
            labels, tf.matmul(one, every, transpose_b=True), from_logits=True
        )
        return tf.reduce_mean(losses)

    return fit(Custom(loss_of), samples=24, batch_size=12)


@program(feature="Custom `train_step`, with `compute_loss`", nightly="replicas")
def computed_loss():
    return fit(Custom(lambda model, x, y: model.compute_loss(x, y, model(x))))


@program
def computed_loss_that_is_a_sum():
    return fit(
        Custom(lambda model, x, y: model.compute_loss(x, y, model(x))),
        loss=mse("sum"),
        optimizer=sgd(0.003),
    )


class CustomLoss(keras.Sequential):
    """A custom `compute_loss`."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        return sum_squared(y, y_pred)


@program(nightly="replicas")
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


@program(fast=True)
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


@program(fast=True)
def sums_over_batches_of_a_sum_and_of_a_mean():
    return fit(Totals())


class Clips(Custom):
    def train_step(self, data):
        loss, gradients = self.gradients(*data[:2])
        gradients, norm = tf.clip_by_global_norm(gradients, 0.3)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"own": loss, "norm": norm}


@program(
    logs_of_worker=True,
    feature="`train_step` that clips with `tf.clip_by_global_norm`",
    nightly="replicas",
)
def clips_gradients_itself():
    return fit(Clips())


@program(nightly="replicas")
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


@program(logs_of_worker=True)
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


@program(nightly="replicas")
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


@program(feature="`train_step` that is a `tf.function`", nightly="replicas")
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


@program(
    logs_of_worker=True,
    feature="Two optimizers in a dict, no `call`, no targets",
)
def adversaries():
    model = Adversaries()
    model.compile()
    rows = X[: SIZE.samples]
    history = model.fit(
        rows, batch_size=SIZE.batch, shuffle=False, verbose=0
    ).history
    return {"weights": weights_of_all_replicas(model), "history": history}


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


@program(
    on="workers",
    logs_of_worker=True,
    fast=True,
    feature="`train_step` that keeps an average of the weights, and counts",
    nightly="workers",
)
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


@program(
    on="threads",
    fast=True,
    feature="Layer that counts samples, and keeps an average",
)
def state_that_a_layer_keeps():
    model = keras.Sequential(
        [keras.Input([6]), Counts(), keras.layers.Dense(1)]
    )
    return fit(model)


@program
def state_that_a_layer_keeps_in_a_custom_step():
    model = Custom()
    model.hidden = keras.Sequential([Counts(), model.hidden])
    return fit(model)


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


@program(nightly="replicas")
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


@program(nightly="replicas")
def gradient_by_hand():
    def update(model, gradient, kernel):
        model.optimizer.apply([gradient], [kernel])

    return fit(ByHand(update), optimizer=sgd(0.1, clipnorm=0.5))


@program(on="workers", logs_of_worker=True, nightly="replicas workers")
def gradient_by_hand_that_is_a_sum():
    def update(model, gradient, kernel):
        model.optimizer.apply_gradients([(gradient, kernel)])

    return fit(ByHand(update, is_sum=True), optimizer=sgd(0.01, momentum=0.9))


@program(
    fast=True,
    feature="`train_step` that updates weights by hand",
)
def weights_that_a_step_updates_itself():
    def update(model, gradient, kernel):
        kernel.assign_sub(0.1 * gradient)

    return fit(ByHand(update))


@program(nightly="replicas")
def weights_that_a_step_updates_by_a_sum():
    def update(model, gradient, kernel):
        kernel.assign(kernel - 0.01 * gradient)

    return fit(ByHand(update, is_sum=True))


@program(nightly="replicas")
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


@program(nightly="replicas")
def optimizer_that_overrides_apply_in_a_custom_step():
    optimizer = Overrides()

    def update(model, gradient, kernel):
        optimizer.apply([gradient], [kernel])

    return fit(ByHand(update))


@program(nightly="replicas")
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


@program(nightly="replicas")
def optimizer_that_is_a_module():
    own = Momentum()
    return fit(ByHand(lambda model, *pair: own.apply(*pair)))


@program(nightly="replicas")
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


@comparing
def negatives_in_a_step():
    def loss_of(model, x, y):
        return ops.mean(in_batch_negatives(y, model.hidden(x)))

    return fit(Custom(loss_of), y=RNG.normal(size=(72, 8)).astype("float32"))


@comparing
def a_sum_and_a_mean_in_a_step():
    def loss_of(model, x, y):
        y_pred = model(x)
        return mean_squared(y, y_pred) + 0.1 * sum_squared(y, y_pred)

    return fit(Custom(loss_of), optimizer=sgd(0.01))
