"""Error feedback (docs/compression.md) and PowerSGD (examples/powersgd.py).

They compress, forget nothing, and train.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import scripts_of_docs
import tensorflow as tf

import keras_allreduce
from keras_allreduce.workers.wire import Wire

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "compression.md").read_text(encoding="utf-8")
FEEDBACK = re.search(
    r"<!-- runs: feedback -->\n```python\n(.*?)```", PAGE, re.DOTALL
)[1]
POWERSGD = (REPOSITORY / "examples" / "powersgd.py").read_text(encoding="utf-8")
RECIPES = {
    "feedback": FEEDBACK.partition("\n\n\nstrategy = ")[0],
    "powersgd": POWERSGD,
}

# The rest of a script, as in examples/powersgd.py.
TRAINS = """
import keras
import numpy as np
keras.utils.set_random_seed(1)
x = np.random.default_rng(0).normal(size=(96, 16)).astype("float32")
y = x @ np.ones((16, 4), "float32")
with strategy.scope():
    model = keras.Sequential([keras.layers.Dense(24), keras.layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.02), "mse")
model.fit(x, y, batch_size=16, epochs=6, verbose=2)
"""


def format_of(name):
    """An object of the class that a recipe defines."""
    names = {}
    exec(RECIPES[name], names)
    (kind,) = (
        each
        for each in names.values()
        if isinstance(each, type)
        and issubclass(each, keras_allreduce.WireFormat)
    )
    return kind()


class TwoWorkers:
    """Host collectives of this worker and of one that sends the same."""

    medium = "nothing"
    device = "/device:CPU:0"

    def __init__(self):
        self.sent = 0

    def sums(self, tensor):
        return True

    def all_reduce(self, tensor, purpose):
        self.sent += tensor.shape.num_elements() * tensor.dtype.size
        return 2 * tensor

    def all_gather(self, tensor, purpose):
        self.sent += tensor.shape.num_elements() * tensor.dtype.size
        return tf.concat([tensor, tensor], 0)


def sums_of(name, steps):
    """What each step gets back, and the bytes that one of them sends."""
    collectives = TwoWorkers()
    wire = Wire(collectives, 2, format_of(name))
    step = tf.function(lambda pack: wire.all_reduce(pack, "pack"))
    found = [step(pack).numpy() for pack in steps]
    return found, collectives.sent


class TestErrorFeedback:
    # 1 + 2^-10 has more bits than bfloat16: alone it is rounded to 1.
    PACK = tf.fill([600], 1 + 2.0**-10)

    def test_what_is_rounded_off_comes_later(self):
        found, _ = sums_of("feedback", [self.PACK] * 64)
        np.testing.assert_array_equal(found[0], np.full(600, 2.0))
        exact = 2 * 64 * self.PACK.numpy()
        error = np.abs(np.sum(found, axis=0, dtype="float64") - exact)
        assert error.max() <= 2 * 2.0**-8  # Of one step, not of 64.

    def test_half_of_the_bytes_cross(self):
        _, sent = sums_of("feedback", [self.PACK])
        assert sent == 600 * 2

    def test_two_traces_share_no_error(self):
        wire = Wire(TwoWorkers(), 2, format_of("feedback"))
        for _ in range(2):
            step = tf.function(lambda pack: wire.all_reduce(pack, "pack"))
            np.testing.assert_array_equal(
                step(self.PACK), np.full(600, 2.0, "float32")
            )

    def test_two_packs_of_a_step_share_no_error(self):
        wire = Wire(TwoWorkers(), 2, format_of("feedback"))

        @tf.function
        def step(pack):
            return [wire.all_reduce(pack, "pack") for _ in range(2)]

        first, second = step(self.PACK)
        np.testing.assert_array_equal(first, second)

    def test_eagerly_nothing_is_kept(self):
        wire = Wire(TwoWorkers(), 2, format_of("feedback"))
        for _ in range(2):
            np.testing.assert_array_equal(
                wire.all_reduce(self.PACK, "pack"), np.full(600, 2.0)
            )


class TestPowerSgd:
    def test_a_pack_of_low_rank_comes_back_whole(self):
        rows = np.random.default_rng(1).normal(size=(30, 2)).astype("float32")
        pack = tf.constant((rows @ rows.T).ravel())
        found, sent = sums_of("powersgd", [pack] * 3)
        np.testing.assert_allclose(found[-1], 2 * pack, atol=1e-4)
        assert sent == 2 * 30 * 4 * 4  # P and Q, of 30 rows and rank 4.

    def test_what_is_left_out_comes_later(self):
        pack = tf.random.stateless_normal([100], seed=[1, 2])
        found, _ = sums_of("powersgd", [pack] * 200)
        mean = np.mean(found, axis=0)
        np.testing.assert_allclose(mean, 2 * pack, atol=0.1)
        assert np.abs(found[0] - 2 * pack.numpy()).max() > 0.5


@pytest.mark.nightly
@pytest.mark.parametrize(
    "code",
    [FEEDBACK + TRAINS + scripts_of_docs.REPORT, POWERSGD],
    ids=RECIPES,
)
def test_a_recipe_trains_two_workers_alike(code, tmp_path):
    output = scripts_of_docs.run_workers(tmp_path, code)
    scripts_of_docs.assert_two_the_same(scripts_of_docs.weights_in(output))
    assert re.search(
        r"sent by each in a step as (bfloat16 with|powersgd)", output
    )
    losses = [float(loss) for loss in re.findall(r"loss: (\S+)", output)]
    assert losses[-1] < losses[0] / 4
