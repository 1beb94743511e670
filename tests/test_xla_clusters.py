"""What XLA compiles of a step, and where its programs end."""

import pytest
import tensorflow as tf
from five_devices import DEVICES

from keras_allreduce import AllReduceStrategy, xla_clusters
from keras_allreduce.compat import xla


def traced(function, *specs):
    graph = tf.function(function).get_concrete_function(*specs).graph
    return graph.get_operations()


def of_type(ops, *types):
    return [op for op in ops if op.type in types]


def chain(x, matrices):
    """Matrices times one another; the gradients of each, the last first."""
    with tf.GradientTape() as tape:
        tape.watch(matrices)
        y = x
        for matrix in matrices:
            y = tf.nn.relu(tf.matmul(y, matrix))
        loss = tf.reduce_sum(y)
    return tape.gradient(loss, matrices)[::-1]


FLOATS = [tf.TensorSpec([4, 4])] * 4


def on_replicas(step, *specs):
    """Ops of a step that two replicas run, marked."""
    strategy = AllReduceStrategy(DEVICES[:2], fit_log=False)
    found = []

    def outer(*args):
        with xla_clusters.marking() as coverage:
            result = strategy.run(step, args)
        found.append(coverage)
        return strategy.experimental_local_results(result)

    return traced(outer, *specs), found[0]


class TestMarks:
    def test_what_is_made_between_the_replicas_is_not(self):
        def step(*m):
            product = chain(m[0], m[1:])[0]
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, product)

        ops, _ = on_replicas(step, *FLOATS)
        sums = of_type(ops, "AddN")
        assert sums
        assert not any(map(xla.is_marked, sums))

    def test_a_shape_that_values_decide_stays_outside(self):
        def step(*m):
            positive = tf.boolean_mask(m[0], tf.reduce_sum(m[0], axis=1) > 0)
            return chain(m[0], m[1:]), tf.matmul(positive, m[0])

        ops, coverage = on_replicas(step, *FLOATS)
        assert coverage.outside["Where"] == len(of_type(ops, "Where")) == 2
        assert not any(map(xla.is_marked, of_type(ops, "Where")))
        assert all(map(xla.is_marked, of_type(ops, "MatMul")))

    def test_a_slice_that_begins_anywhere_runs_on_any_cpu_device(self):
        """TensorFlow computes its size on the first, which XLA refuses."""

        def step(x, begin):
            product = tf.matmul(x, x)
            return tf.matmul(tf.slice(product, begin, [-1, 4]), product)

        strategy = AllReduceStrategy(DEVICES[:2], fit_log=False)

        @tf.function
        def outer(*args):
            with xla_clusters.marking():
                result = strategy.run(step, args)
            return strategy.experimental_local_results(result)

        for found in outer(tf.eye(4), tf.constant([1, 0])):
            assert found.numpy().tolist() == tf.eye(4)[1:].numpy().tolist()

    def test_strings_stay_outside_and_are_counted(self):
        def step(*m):
            text = tf.strings.join([tf.strings.as_string(m[0]), "x"])
            return chain(m[0], m[1:]), tf.strings.length(text)

        ops, coverage = on_replicas(step, *FLOATS)
        strings = of_type(ops, "StringJoin", "AsString", "StringLength")
        assert len(strings) == 2 * 3
        assert not any(map(xla.is_marked, strings))
        assert coverage.outside["StringJoin"] == 2
        assert 0.5 < coverage.share < 1

    def test_what_a_branch_does_counts_as_outside(self):
        def step(*m):
            return tf.cond(
                tf.reduce_sum(m[0]) > 0,
                lambda: tf.matmul(m[0], m[1]),
                lambda: m[1],
            )

        _, coverage = on_replicas(step, *FLOATS)
        assert coverage.outside["MatMul"] == 2

    def test_a_few_small_ops_are_no_program_of_their_own(self):
        ops, coverage = on_replicas(lambda x: x / 2.0 + 1.0, FLOATS[0])
        assert not any(map(xla.is_marked, ops))
        assert not coverage.compiled


class TestCut:
    def scopes(self, parts_of):
        """Scope of each matmul that makes a gradient, the last layer first."""
        found = []

        def outer(*m):
            with xla_clusters.marking():
                gradients = chain(m[0], m[1:])
                xla_clusters.cut(parts_of(gradients))
            found.extend(xla.scope_of(each.op) for each in gradients)
            return gradients

        traced(outer, *FLOATS)
        return found

    def test_each_part_is_a_scope_of_its_own(self):
        last, middle, first = self.scopes(lambda g: [[each] for each in g])
        assert len({last, middle, first}) == 3

    def test_gradients_of_a_part_share_its_scope(self):
        last, middle, first = self.scopes(lambda g: [g[:2], g[2:]])
        assert last == middle
        assert middle != first

    def test_a_second_sum_leaves_the_parts_of_the_first(self):
        def outer(*m):
            with xla_clusters.marking():
                gradients = chain(m[0], m[1:])
                xla_clusters.cut([[each] for each in gradients])
                before = [xla.scope_of(each.op) for each in gradients]
                xla_clusters.cut([gradients])
                assert before == [xla.scope_of(each.op) for each in gradients]
            return gradients

        traced(outer, *FLOATS)

    def test_the_gradient_of_a_bias_is_made_where_its_input_is(self):
        def outer(x, matrix):
            bias = tf.zeros([4])
            with xla_clusters.marking():
                with tf.GradientTape() as tape:
                    tape.watch([matrix, bias])
                    y = tf.nn.bias_add(tf.matmul(x, matrix), bias)
                    loss = tf.reduce_sum(y * y)
                of_matrix, of_bias = tape.gradient(loss, [matrix, bias])
                xla_clusters.cut([[of_matrix], [of_bias]])
            scopes = [xla.scope_of(each.op) for each in (of_matrix, of_bias)]
            assert scopes[0] == scopes[1]
            return of_matrix, of_bias

        traced(outer, *FLOATS[:2])

    def test_gradients_that_a_branch_sends_are_found_outside_of_it(self):
        def outer(*m):
            with xla_clusters.marking():
                gradients = chain(m[0], m[1:])

                def send():
                    inner = [each + 1.0 for each in gradients]
                    xla_clusters.cut([[each] for each in inner])
                    return inner

                tf.cond(tf.reduce_sum(m[0]) > 0, send, lambda: list(gradients))
            scopes = {xla.scope_of(each.op) for each in gradients}
            assert len(scopes) == 3
            return gradients

        traced(outer, *FLOATS)


class TestIsWorthAProgram:
    """Of a function."""

    def graph(self, function, *specs):
        return tf.function(function).get_concrete_function(*specs).graph

    def adam(self, x):
        return x - 0.1 * x / (tf.sqrt(tf.square(x) + 1.0) + 1e-7)

    def test_ops_with_kernels_are(self):
        graph = self.graph(self.adam, FLOATS[0])
        assert xla_clusters.is_worth_a_program(graph, "/cpu:0", parts=1)

    @pytest.mark.parametrize(
        ("device", "is_worth"), [("/cpu:0", False), ("/gpu:0", True)]
    )
    def test_few_ops_of_a_part_are_not_on_a_cpu(self, device, is_worth):
        graph = self.graph(lambda x: x - 0.1 * x, FLOATS[0])
        found = xla_clusters.is_worth_a_program(graph, device, parts=1)
        assert found == is_worth

    def test_strings_are_not(self):
        def step(x):
            return self.adam(x), tf.strings.as_string(x)

        graph = self.graph(step, FLOATS[0])
        assert not xla_clusters.is_worth_a_program(graph, "/cpu:0", parts=1)

    def test_strings_in_a_branch_are_not(self):
        def step(x):
            return self.adam(x), tf.cond(
                tf.reduce_sum(x) > 0,
                lambda: tf.strings.length(tf.strings.as_string(x)),
                lambda: tf.zeros([4, 4], tf.int32),
            )

        graph = self.graph(step, FLOATS[0])
        assert not xla_clusters.is_worth_a_program(graph, "/cpu:0", parts=1)
