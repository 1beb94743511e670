"""How TensorFlow and Keras are told what XLA compiles."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from clusters import Clustered, trained

from keras_allreduce.compat import keras_door, xla


def ops_of(function, *specs):
    return tf.function(function).get_concrete_function(*specs).graph


FLOATS = tf.TensorSpec([4, 4])


class TestMarks:
    def test_jit_scope_marks_ops_and_gives_them_a_scope(self):
        def marked(x):
            with tf.xla.experimental.jit_scope():
                return tf.matmul(x, x)

        (op,) = (
            op
            for op in ops_of(marked, FLOATS).get_operations()
            if op.type == "MatMul"
        )
        assert xla.is_marked(op)
        assert xla.scope_of(op).startswith("jit_scope")
        xla.set_scope(op, "mine")
        assert xla.scope_of(op) == "mine"
        xla.unmark(op)
        assert not xla.is_marked(op)

    def test_other_ops_have_no_marks(self):
        graph = ops_of(lambda x: x + 1.0, FLOATS)
        assert not any(map(xla.is_marked, graph.get_operations()))
        assert {xla.scope_of(op) for op in graph.get_operations()} == {""}

    @pytest.mark.parametrize(
        ("function", "spec", "op_type", "expected"),
        [
            (lambda x: tf.matmul(x, x), FLOATS, "MatMul", True),
            (
                lambda x: tf.strings.join([x, x]),
                tf.TensorSpec([4], tf.string),
                "StringJoin",
                False,
            ),
            (tf.identity, tf.TensorSpec([4], tf.string), "Identity", False),
            (tf.identity, FLOATS, "Identity", True),
        ],
        ids=["matmul", "join", "identity of strings", "identity of floats"],
    )
    def test_it_is_known_what_xla_has_kernels_for(
        self, function, spec, op_type, expected
    ):
        ops = ops_of(function, spec).get_operations()
        op = next(op for op in ops if op.type == op_type)
        assert xla.has_kernel(op, "CPU") == expected

    def test_the_functions_of_branches_are_found(self):
        def branches(x):
            return tf.cond(
                tf.reduce_sum(x) > 0, lambda: tf.matmul(x, x), lambda: x
            )

        found = [
            inner.type
            for op in ops_of(branches, FLOATS).get_operations()
            for graph in xla.graphs_of_functions(op)
            for inner in graph.get_operations()
        ]
        assert "MatMul" in found

    def test_a_captured_tensor_is_found_in_the_outer_graph(self):
        seen = []

        def outer(x):
            y = tf.square(x)

            def branch():
                seen.append((y, tf.identity(y).op.inputs[0]))
                return y

            return tf.cond(tf.reduce_sum(x) > 0, branch, branch)

        ops_of(outer, FLOATS)
        for y, inner in seen:
            assert inner is not y
            assert xla.outer_tensor(inner) is y
            assert xla.outer_tensor(y) is y


class TestHost:
    """TensorFlow computes the size of a slice on the first CPU device."""

    @staticmethod
    def sliced(device):
        @tf.function(autograph=False)
        def function(x, begin):
            with tf.device(device), tf.xla.experimental.jit_scope():
                return tf.matmul(x, tf.slice(tf.matmul(x, x), begin, [-1, 4]))

        return function

    @pytest.mark.parametrize("number", [0, 1])
    def test_xla_refuses_a_program_of_two_cpu_devices(self, number):
        function = self.sliced(f"/cpu:{number}")
        arguments = tf.eye(4), tf.constant([0, 0])
        (op,) = (
            op
            for op in function.get_concrete_function(
                *arguments
            ).graph.get_operations()
            if op.type == "Slice"
        )
        assert xla.is_moved_to_host(op) == bool(number)
        if number:
            with pytest.raises(tf.errors.InternalError, match="Multiple CPU"):
                function(*arguments)
        else:
            function(*arguments)


class TestOptimizer:
    """TensorFlow's, which runs before the clustering."""

    @pytest.mark.parametrize("keeps", [False, True])
    def test_what_is_kept_is_not_fused(self, keeps):
        """On a CPU a matmul, its bias and an activation become one op."""

        @tf.function
        def layer(x, bias):
            product = tf.matmul(x, x)
            if keeps:
                xla.keep_from_fusing(product.op)
            return tf.nn.relu(tf.nn.bias_add(product, bias))

        clustered = Clustered.of(lambda: layer(tf.ones([4, 4]), tf.ones([4])))
        assert ("MatMul" in clustered.outside) == keeps
        assert ("_FusedMatMul" in clustered.outside) != keeps


class TestDoor:
    def test_keras_makes_the_functions_of_steps_in_these_methods(self):
        for name in ("train", "test", "predict"):
            model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            getattr(model, f"make_{name}_function")()
            assert getattr(model, f"{name}_function") is not None

    def test_it_leaves_models_without_a_strategy_alone(self):
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=True)
        assert not keras_door.compiles_replicas(model)
        model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)

    @pytest.mark.slow
    def test_keras_compiles_nothing_around_the_replicas(self, monkeypatch):
        made = []
        stock = tf.function

        def function(*args, **kwargs):
            made.append(kwargs.get("jit_compile"))
            return stock(*args, **kwargs)

        model = trained(jit_compile=True, replicas=2)
        monkeypatch.setattr(tf, "function", function)
        for make in (
            model.make_train_function,
            model.make_test_function,
            model.make_predict_function,
        ):
            make(force=True)
        assert made
        assert not any(made)
        assert model.jit_compile is True

    @pytest.mark.slow
    def test_a_keras_that_no_longer_fits_is_refused(self, monkeypatch):
        model = trained(jit_compile=True, replicas=2)
        monkeypatch.setattr(keras_door, "makes_functions", lambda: False)
        with pytest.raises(ValueError, match="not a step of several"):
            model.fit(np.ones([4, 6]), np.ones([4, 1]), verbose=0)
