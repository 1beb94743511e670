"""What Keras must do for the package to work, one test for each assumption.

Each function of `compat/keras.py` and each method that a step shadows has a
test here. It runs Keras without a strategy of ours, so that a test that fails
after an upgrade names the assumption that broke, not its consequences.
"""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf
from five_devices import DEVICES
from programs.table import weighs_outputs_by_trace

from keras_allreduce.compat import (
    graphs,
    keras_door,
    keras_losses,
)
from keras_allreduce.compat import keras as keras_compat

pytestmark = pytest.mark.slow

X = np.arange(8, dtype="float32").reshape(4, 2) / 8
Y = np.zeros([4, 1], "float32")


class SpyStrategy(tf.distribute.MirroredStrategy):
    """TensorFlow's own strategy, which notes what Keras asks of it."""

    def __init__(self):
        super().__init__(DEVICES[:2], tf.distribute.ReductionToOneDevice())
        self.reductions = []

    def reduce(self, reduce_op, value, axis):
        if keras_compat.are_scalar_logs(reduce_op, value, axis):
            self.reductions.append(keras_compat.are_scalar_logs)
        if keras.tree.is_nested(value):
            return keras.tree.map_structure(
                lambda leaf: self.experimental_local_results(leaf)[0], value
            )
        return super().reduce(reduce_op, value, axis)


class StrategyBehindDoor(SpyStrategy):
    """The same, whose models the door knows; notes their steps."""

    samples_to_measure = 4

    def __init__(self):
        keras_door.install()
        self.steps = []
        super().__init__()

    def prepare_model(self, model, batch):
        """As the door asks of a strategy of ours."""

    def run(self, fn, args=(), kwargs=None, options=None):
        self.steps.append(keras_compat.step_of(fn))
        return super().run(fn, args, kwargs, options)


class SpyLoss(keras.losses.Loss):
    """A custom loss of Keras's usual kind."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class ScalarLoss(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return keras.ops.mean(y_pred)


class CustomStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


def linear(*layers, kind=keras.Sequential):
    return kind(
        [
            keras.Input([2]),
            *layers,
            keras.layers.Dense(1, kernel_initializer="ones", use_bias=False),
        ]
    )


def compiled(model=None, optimizer=None, loss="mse", **compile_args):
    model = model or linear()
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **compile_args)
    return model


def fit(model, x=X, y=Y, batch_size=4, **fit_args):
    return model.fit(
        x, y, batch_size=batch_size, shuffle=False, verbose=0, **fit_args
    )


def under_spy(strategy=SpyStrategy, **compile_args):
    strategy = strategy()
    with strategy.scope():
        model = compiled(**compile_args)
    return strategy, model


def spy(owner, name):
    """Shadows a method of one object as a step does; returns its calls."""
    calls = []
    method = getattr(owner, name)

    @tf.autograph.experimental.do_not_convert
    def noted(*args, **kwargs):
        calls.append((args, kwargs))
        return method(*args, **kwargs)

    vars(owner)[name] = noted
    return calls


# Trainer: steps and logs -----------------------------------------------------


def test_keras_runs_a_step_in_the_function_that_it_makes():
    strategy, model = under_spy(StrategyBehindDoor)
    fit(model)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    model.predict(X, batch_size=4, verbose=0)
    model.train_on_batch(X, Y)
    model.test_on_batch(X, Y)
    model.predict_on_batch(X)
    names = [step for owner, step in strategy.steps if owner is model]
    assert list(dict.fromkeys(names)) == [
        "train_step",
        "test_step",
        "predict_step",
    ]
    assert len(names) == len(strategy.steps)


def test_keras_passes_its_bound_step_to_strategy_run(monkeypatch):
    strategy, model = under_spy(StrategyBehindDoor)
    monkeypatch.setattr(keras_compat.keras_calls, "current_step", lambda: None)
    fit(model)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    assert set(strategy.steps) == {(model, "train_step"), (model, "test_step")}


def test_a_function_that_is_no_step_of_keras_is_not_taken_for_one():
    model = compiled()
    assert keras_compat.step_of(lambda data: data) == (None, "")
    assert keras_compat.step_of(model.predict_step) == (None, "")
    bound = tf.autograph.experimental.do_not_convert(model.test_step)
    assert keras_compat.step_of(bound) == (model, "test_step")


@pytest.mark.parametrize("name", ["train_step", "test_step", "compute_loss"])
def test_keras_does_not_override_its_own_steps(name):
    inputs = keras.Input([2])
    functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert keras_compat.is_keras_method(functional, name)
    assert keras_compat.is_keras_method(linear(), name)


def test_a_custom_step_is_not_keras_own():
    model = linear(kind=CustomStep)
    assert not keras_compat.is_keras_method(model, "train_step")
    assert keras_compat.is_keras_method(model, "test_step")
    assert keras_compat.is_custom_step(model, "train_step")
    assert not keras_compat.is_custom_step(model, "test_step")


@pytest.mark.xfail(
    weighs_outputs_by_trace(),
    reason="This Keras weighs them by the size of the batch that it has traced "
    "first, which replicas do not have: docs/versions.md.",
    strict=True,
)
def test_keras_weighs_the_losses_of_outputs_alike_in_all_batches():
    inputs = keras.Input([2])
    outputs = [
        keras.layers.Dense(1, name=name, kernel_initializer="ones")(inputs)
        for name in "ab"
    ]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), ["mse", "mae"])
    x = np.array([[1, 0], [1, 0], [3, 0]], "float32")
    history = fit(model, x, [Y[:3], Y[:3]], batch_size=2).history
    # A batch of two samples that cost 1, and one of one sample that costs 9.
    assert history["a_loss"] == [5]


def test_keras_shows_the_results_of_the_metrics_after_a_step():
    model = compiled(metrics=["mae"])
    logs = model.train_on_batch(X, Y, return_dict=True)
    results = {k: float(v) for k, v in model.get_metrics_result().items()}
    assert {k: float(v) for k, v in logs.items()} == results


# Trainer: what it asks of a strategy -----------------------------------------


def test_keras_builds_models_on_a_batch_in_symbolic_build():
    _, model = under_spy()
    calls = spy(model, "_symbolic_build")
    fit(model)
    model.train_on_batch(X, Y)
    for _, kwargs in calls:
        batch = kwargs["data_batch"]
        assert [part.shape for part in batch[:2]] == [(2, 2), (2, 1)] or [
            part.shape for part in batch[:2]
        ] == [(4, 2), (4, 1)]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "wrap",
    [
        tf.function,
        tf.autograph.experimental.do_not_convert,
        lambda step: lambda *data: step(*data),
    ],
    ids=["tf.function", "do_not_convert", "plain"],
)
def test_a_step_is_recognised_whatever_wraps_it(wrap):
    class Wrapped(keras.Sequential):
        train_step = wrap(keras.Sequential.train_step)

    strategy = StrategyBehindDoor()
    with strategy.scope():
        model = compiled(linear(kind=Wrapped), run_eagerly=True)
    seen = []

    def run(fn, args):
        seen.append(keras_compat.step_of(fn))
        return {"loss": tf.constant(0.0)}

    strategy.run = run
    fit(model)
    model.train_step = lambda data: {"loss": tf.constant(0.0)}
    model.make_train_function(force=True)
    fit(model)
    assert seen == 2 * [(model, "train_step")]


def test_a_function_of_the_model_is_inlined():
    class Functions(keras.Sequential):
        @tf.function
        def train_step(self, data):
            return tf.constant(1)

    model = linear(kind=Functions)
    (name, plain), *others = keras_compat.inlined_functions(model)
    assert not others
    assert name == "train_step"
    with tf.Graph().as_default() as graph:
        plain(None)
        assert [op.type for op in graph.get_operations()] == ["Const"]


def test_keras_takes_the_mean_of_scalar_logs_along_axis_0(monkeypatch):
    strategy, model = under_spy(run_eagerly=True)
    # What Keras asks before it takes the branch of several workers.
    monkeypatch.setattr(
        tf.distribute, "MultiWorkerMirroredStrategy", SpyStrategy
    )
    monkeypatch.setattr(
        strategy.extended, "_in_multi_worker_mode", lambda: True
    )
    asked = []

    def reduce(reduce_op, value, axis):
        if keras_compat.are_scalar_logs(reduce_op, value, axis):
            asked.append(value)
        return strategy.experimental_local_results(value)[0]

    monkeypatch.setattr(strategy, "reduce", reduce)
    fit(model)
    assert asked


def test_keras_divides_the_loss_by_the_replicas_and_shows_it_undivided():
    divided = []

    class Seen(keras.Sequential):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            divided.append(loss)
            return loss

    strategy = SpyStrategy()
    with strategy.scope():
        model = compiled(linear(kind=Seen), run_eagerly=True)
    x = np.ones([4, 2], "float32")
    shown = model.evaluate(x, Y, batch_size=4, verbose=0)
    assert [float(loss) for loss in divided[-2:]] == [2, 2]
    assert shown == 4


# Layers ----------------------------------------------------------------------


def test_keras_lists_the_layers_of_layers():
    inner = keras.layers.Dense(1)
    model = keras.Sequential([keras.Input([2]), keras.Sequential([inner])])
    assert inner not in model.layers
    assert any(layer is inner for layer in keras_compat.layers(model))
    assert any(layer is model for layer in keras_compat.layers(model))


def test_keras_says_of_a_layer_that_it_is_synchronized():
    batch_normalization = keras.layers.BatchNormalization
    assert keras_compat.is_synchronized(batch_normalization(synchronized=True))
    assert not keras_compat.is_synchronized(batch_normalization())
    assert not keras_compat.is_synchronized(keras.layers.Dense(1))


# Losses ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error])
def test_keras_takes_the_mean_of_losses_that_are_names_or_functions(loss):
    assert keras_losses.reduction(loss) == "sum_over_batch_size"
    shown = compiled(loss=loss).evaluate(np.ones([3, 2]), Y[:3], verbose=0)
    assert shown == 4


@pytest.mark.parametrize(
    "reduction",
    ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight"],
)
def test_keras_says_of_a_loss_how_it_is_reduced(reduction):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    assert keras_losses.reduction(loss) == reduction


def test_keras_wraps_a_custom_function_with_the_function_in_fn():
    def custom(y_true, y_pred, axis):
        return y_pred

    # `LossFunctionWrapper`, which has no public name.
    wrapped = keras.losses.MeanSquaredError.__bases__[0](custom, axis=1)
    assert isinstance(wrapped, keras.losses.Loss)
    assert wrapped.fn is custom
    assert wrapped._fn_kwargs == {"axis": 1}
    y_pred = keras.KerasTensor([None, 2])
    assert not keras_losses.is_one_value_per_sample(wrapped, y_pred)


@pytest.mark.parametrize(
    "loss",
    ["mse", "mae", "poisson", "Huber", "sparse_categorical_crossentropy"],
)
def test_keras_wraps_the_public_functions_of_its_losses(loss):
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])
    model.compile("sgd", loss)
    assert keras_losses.losses_of_batch(model) == []


def test_losses_of_compile_that_are_not_one_value_per_sample_are_named():
    def rms(y_true, y_pred):
        return keras.ops.sqrt(keras.ops.mean((y_true - y_pred) ** 2))

    inputs = keras.Input([6])
    outputs = [keras.layers.Dense(3)(inputs) for _ in range(4)]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", [rms, "mse", None, "dice"])
    assert keras_losses.losses_of_batch(model) == ["rms", "dice"]


@pytest.mark.parametrize(
    ("loss", "as_keras"),
    [
        (keras.losses.Huber(), True),
        (SpyLoss(), True),
        (ScalarLoss(), False),
    ],
    ids=["object", "custom call", "custom __call__"],
)
def test_keras_reduces_losses_in_call_of_the_base_class(loss, as_keras):
    assert keras_losses.reduces_as_keras(loss) == as_keras


def test_keras_calls_the_losses_of_compile_one_by_one():
    calls = []

    def replace(index, loss):
        def replaced(y_true, y_pred, sample_weight):
            calls.append((index, loss.name))
            return loss(y_true, y_pred, sample_weight)

        return replaced

    inputs = keras.Input([2])
    outputs = [keras.layers.Dense(1, name=name)(inputs) for name in "ab"]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", [SpyLoss(), "mae"], run_eagerly=True)
    for _ in range(2):  # Before Keras has made its list, and after.
        with keras_losses.compiled_losses_replaced(model, replace):
            model.evaluate(X, [Y, Y], verbose=0)
    expected = [(0, "spy_loss"), (1, "mae")]
    assert calls == expected * 2
    model.evaluate(X, [Y, Y], verbose=0)
    assert calls == expected * 2


def test_keras_shows_the_rank_and_mask_of_what_it_reduces_in_call():
    loss = SpyLoss()
    value, rank, mask = keras_losses.call_and_see(loss, Y + 1, Y, None)
    assert (float(value), rank, mask) == (1, 1, None)


def test_a_loss_that_another_thread_may_use_stays_as_it_is():
    class Looks(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen.append(dict(vars(loss)))
            return y_pred - y_true

    seen, loss = [], Looks()
    before = dict(vars(loss))
    keras_losses.call_and_see(loss, Y, Y + 1, None)
    assert seen == [before]


def test_keras_counts_what_both_masks_leave():
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=2)
    y_true = np.array([[0, 1, 2, 2]])
    y_pred = tf.fill([1, 4, 3], 1 / 3)
    _, _, mask = keras_losses.call_and_see(loss, y_true, y_pred, None)
    np.testing.assert_array_equal(mask, [[True, True, False, False]])
    keras_losses.attach_mask(y_pred, tf.constant([[True, False, True, False]]))
    _, _, mask = keras_losses.call_and_see(loss, y_true, y_pred, None)
    np.testing.assert_array_equal(mask, [[True, False, False, False]])


def test_keras_attaches_the_mask_to_the_output():
    embedding = keras.layers.Embedding(3, 2, mask_zero=True)
    mask = keras_losses.mask_of(embedding(np.array([[1, 0]])))
    np.testing.assert_array_equal(mask, [[True, False]])
    assert keras_losses.mask_of(tf.ones([1])) is None


def test_keras_keeps_added_losses_in_one_list_of_a_layer():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

    model = keras.Sequential([keras.Input([2]), Adds()])

    def in_thread(value):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(added, value).result()

    def added(value):
        model(np.full([1, 2], value))
        return [float(each) for each in model.losses]

    with keras_losses.added_losses_of_each_thread(model):
        assert added(1.0) == [2.0]
        assert in_thread(2.0) == [4.0]
        assert [float(each) for each in model.losses] == [2.0]
    assert added(3.0) == [6.0]


def test_keras_lists_added_losses_before_those_of_regularizers():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.sum(x))
            return x

    model = keras.Sequential(
        [
            keras.Input([2]),
            keras.layers.Dense(1, kernel_regularizer="l2"),
            Adds(),
        ]
    )
    added = model(X)
    assert keras_losses.num_added_losses(model) == 1
    assert len(model.losses) == 2
    np.testing.assert_allclose(model.losses[0], tf.reduce_sum(added))


def test_keras_passes_each_added_loss_to_one_method():
    model = compiled(linear(keras.layers.ActivityRegularization(l2=1.0)))
    model.run_eagerly = True
    calls = spy(model, keras_losses.ADDS_A_LOSS)
    fit(model)
    assert len(calls) == 1


# Gradients --------------------------------------------------------------------


def test_a_tape_knows_whether_another_records_it():
    x = tf.Variable(2.0)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            y = x * x
        assert graphs.is_recorded_by_another(inner)
    assert not graphs.is_recorded_by_another(outer)
    with tf.GradientTape(persistent=True) as tape:
        y = x * x
        assert not graphs.is_recorded_by_another(tape)
    assert tape.gradient(y, x) == 4


def test_a_function_tells_all_variables_that_it_uses():
    read, assigned = tf.Variable(1.0), tf.Variable([2], dtype=tf.int64)

    @tf.function
    def use():
        assigned.assign([3])
        return read + 1

    found = graphs.captured_variables(use.get_concrete_function())
    assert {dtype for _, dtype in found} == {tf.float32, tf.int64}


# Optimizers ------------------------------------------------------------------


def test_keras_holds_optimizers_in_attributes_of_the_model():
    model = compiled()
    model.second = keras.optimizers.Adam()
    found = keras_compat.optimizers_of(model)
    assert len(found) == 2
    assert found[0] is model.optimizer
    assert found[1] is model.second


def test_keras_puts_an_optimizer_inside_a_loss_scale_optimizer():
    sgd = keras.optimizers.SGD()
    outer = keras.optimizers.LossScaleOptimizer(sgd)
    assert keras_compat.inner_optimizer(outer) is sgd
    assert keras_compat.inner_optimizer(sgd) is None


@pytest.mark.parametrize(
    ("optimizer", "has_slots"),
    [
        (keras.optimizers.SGD(0.1), False),
        (keras.optimizers.SGD(0.1, momentum=0.9), True),
        (keras.optimizers.SGD(0.1, use_ema=True), True),
        (keras.optimizers.Adam(), True),
        (keras.optimizers.Lion(), True),
    ],
)
def test_the_variables_of_an_optimizer_are_all_that_it_writes(
    optimizer, has_slots
):
    variable = keras.Variable(np.ones([2]))
    optimizer.build([variable])
    assert keras_compat.has_slots(optimizer) == has_slots
    listed = [*optimizer.variables, variable]
    update = tf.function(lambda g: optimizer.apply([g], [variable]))
    graph = update.get_concrete_function(tf.ones([2])).graph
    handles = {id(inner): outer for outer, inner in graph.captures}
    assigned = [
        handles[id(op.inputs[0])]
        for op in graph.get_operations()
        if op.type.startswith("Assign")
    ]
    assert len(assigned) >= 2
    for handle in assigned:
        assert any(handle is each.value.handle for each in listed)


def test_keras_says_of_an_optimizer_that_it_accumulates():
    sgd = keras.optimizers.SGD(gradient_accumulation_steps=2)
    outer = keras.optimizers.LossScaleOptimizer(sgd)
    assert keras_compat.accumulates(sgd)
    assert keras_compat.accumulates(outer)
    assert not keras_compat.accumulates(keras.optimizers.SGD())


def test_keras_adds_gradients_up_in_one_accumulator_per_variable():
    sgd = keras.optimizers.SGD(gradient_accumulation_steps=3)
    variables = [keras.Variable([0.0]), keras.Variable([0.0])]
    assert keras_compat.gradient_accumulators(sgd, variables) is None
    for _ in range(2):
        sgd.apply([tf.constant([1.0]), tf.constant([2.0])], variables)
    found = keras_compat.gradient_accumulators(sgd, variables[::-1])
    assert [float(each[0]) for each in found] == [4, 2]


def test_keras_starts_again_from_accumulators_that_are_zero():
    sgd = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    variable = keras.Variable([0.0])
    sgd.apply([tf.constant([8.0])], [variable])
    (found,) = keras_compat.gradient_accumulators(sgd, [variable])
    found.assign([0.0])
    sgd.apply([tf.constant([2.0])], [variable])
    assert float(variable[0]) == -1


def test_keras_counts_gradients_and_shows_updates():
    sgd = keras.optimizers.SGD(gradient_accumulation_steps=2)
    variable = keras.Variable([0.0])
    for _ in range(4):
        sgd.apply([tf.constant([1.0])], [variable])
    assert int(keras_compat.iterations(sgd)) == 4
    assert int(sgd.iterations) == 2


def test_keras_assigns_some_variables_their_gradient():
    variable = keras.Variable([0.0])
    assert not keras_compat.takes_gradient_as_value(variable)
    variable.overwrite_with_gradient = True
    assert keras_compat.takes_gradient_as_value(variable)
    other = keras.Variable([0.0])
    sgd = keras.optimizers.SGD(0.5)
    sgd.apply([tf.constant([4.0]), tf.constant([4.0])], [variable, other])
    assert (float(variable[0]), float(other[0])) == (4, -2)


# Methods that a step shadows -------------------------------------------------


@pytest.fixture(params=[True, False], ids=["eager", "traced"])
def model(request):
    return compiled(
        linear(keras.layers.Dropout(0.5), keras.layers.BatchNormalization()),
        run_eagerly=request.param,
    )


def test_keras_computes_the_loss_of_a_step_in_compute_loss(model):
    calls = spy(model, "compute_loss")
    fit(model)
    assert calls
    for (_, _, y_pred, sample_weight), kwargs in calls:
        assert y_pred.shape == (4, 1)
        assert sample_weight is None
        assert kwargs == {"training": True}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_keras_scales_the_loss_inside_the_tape(eager):
    model = compiled(run_eagerly=eager)
    vars(model.optimizer)["scale_loss"] = lambda loss: loss * 3
    history = fit(model, np.ones([4, 2], "float32")).history
    # The gradient of the mean of (a + b)^2 at a = b = 1 is 4 for each.
    np.testing.assert_allclose(
        model.get_weights()[0], np.full([2, 1], 1 - 0.1 * 4 * 3), rtol=1e-6
    )
    assert history["loss"] == [4]


def test_keras_clips_and_updates_inside_apply(model):
    model.optimizer.clipnorm = 1e-3
    taken = []

    def apply(grads, trainable_variables=None):
        taken.append((list(grads), list(trainable_variables)))

    vars(model.optimizer)["apply"] = apply
    before = model.get_weights()[0]
    fit(model)
    ((gradients, variables),) = taken
    assert len(gradients) == len(variables) == len(model.trainable_variables)
    # Nothing was updated, so all that Keras does is in `apply`.
    np.testing.assert_array_equal(model.get_weights()[0], before)


def test_keras_applies_through_the_inner_optimizer_of_a_loss_scale_optimizer():
    inner = keras.optimizers.SGD(0.1)
    model = compiled(
        optimizer=keras.optimizers.LossScaleOptimizer(inner), run_eagerly=True
    )
    calls = spy(inner, "apply")
    fit(model)
    assert len(calls) == 1


def test_keras_assigns_the_scales_of_float8_their_gradients():
    model = linear()
    model.quantize("float8")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    assigned = [
        variable
        for variable in model.trainable_variables
        if keras_compat.takes_gradient_as_value(variable)
    ]
    before = [variable.numpy() for variable in assigned]
    fit(model)
    after = [variable.numpy() for variable in assigned]
    # Of inputs, kernel and gradients: a scale, and the last largest values.
    assert len(assigned) == 6
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))


def test_keras_draws_the_seeds_of_layers_with_next(model):
    (generator,) = (
        layer.seed_generator
        for layer in model.layers
        if isinstance(layer, keras.layers.Dropout)
    )
    calls = spy(generator, "next")
    fit(model)
    assert calls
    assert all(set(kwargs) <= {"ordered"} for _, kwargs in calls)
    assert all(len(args) <= 1 for args, _ in calls)


def test_replicas_update_moving_statistics_each_on_its_own():
    with SpyStrategy().scope():
        model = linear(keras.layers.BatchNormalization())
    statistics = [
        variable
        for variable in model.non_trainable_variables
        if variable.name.startswith("moving_")
    ]
    assert len(statistics) == 2
    for each in statistics:
        assert each.value.aggregation == tf.VariableAggregation.NONE
        assert hasattr(each.value, "_update_replica")


def test_attributes_of_any_model_are_those_that_keras_sets_in_a_step():
    known = keras_compat.attributes_of_any_model()
    assert {"built", "_called", "compiled", "_lock", "name"} <= known
    first = keras.Model().name
    keras_compat.attributes_of_any_model.cache_clear()
    keras_compat.attributes_of_any_model()
    # No number is taken from the names of the user's models.
    number = int(first.partition("_")[2] or 0)
    assert keras.Model().name == f"model_{number + 1}"


def test_variables_of_keras_and_tensorflow_have_one_identity():
    one, other = keras.Variable(1.0), keras.Variable(2.0)
    identity = keras_compat.identity_of
    assert identity(one) == identity(one.value)
    assert identity(one.value) != identity(other.value)


def test_layers_that_are_not_kerass_may_keep_state():
    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.count = self.add_weight(trainable=False)

    class Holds(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(0)
            self.dense = keras.layers.Dense(1)

    class Neither(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.normalize = keras.layers.BatchNormalization()
            self.weight = self.add_weight()

        def call(self, inputs):
            return self.normalize(inputs) * self.weight

    keeps = keras_compat.keeps_own_state
    assert keeps(linear(Counts()))
    assert keeps(linear(Holds()))
    assert not keeps(linear(Neither()))
    assert not keeps(linear(keras.layers.BatchNormalization()))


def test_keras_sums_gradients_with_all_reduce_of_the_replica(monkeypatch):
    strategy = SpyStrategy()
    with strategy.scope():
        model = compiled()
    asked = []
    stock = tf.distribute.ReplicaContext.all_reduce

    def all_reduce(self, reduce_op, value, options=None):
        asked.append((reduce_op, len(tf.nest.flatten(value))))
        return stock(self, reduce_op, value, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", all_reduce)
    fit(model)
    assert set(asked) == {(tf.distribute.ReduceOp.SUM, 1)}
